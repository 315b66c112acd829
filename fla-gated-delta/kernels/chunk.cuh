// chunk: what the passes by chunks share: the chunks and segments of tokens, the factors of a chunk's rows, and the parts of
// a scan that holds a slice of a state in registers.
//
// The scans hold states transposed, S^T [V, K]: it is then the left operand of every product with the state, in the lanes
// as it lies, and the right operands are chunks of tokens in shared memory.
#pragma once
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/scan.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>

namespace fla::gated_delta {

// What is compiled in of a chunk's tiles.
template <class Cfg>
concept ChunkTiles = requires {
    typename Cfg::Element;  // what vectors are stored as
    typename Cfg::Half;     // what operands of products are
    typename Cfg::Work;     // what is kept between launches: Half, or float where PARTS = 2
    Cfg::PARTS;             // 16-bit numbers for each element of an operand
    Cfg::C;                 // rows of a chunk
    Cfg::K;                 // key channels
    Cfg::V;                 // value channels
};

template <class Cfg>
inline constexpr int PADDED_K = ceil_div(Cfg::K, 64) * 64;
template <class Cfg>
inline constexpr int PADDED_V = ceil_div(Cfg::V, 32) * 32;
// Whether rows of vectors start at multiples of 16 bytes.
template <class Cfg>
inline constexpr bool VECTORS_K = Cfg::K * sizeof(typename Cfg::Element) % 16 == 0;
template <class Cfg>
inline constexpr bool VECTORS_V = Cfg::V * sizeof(typename Cfg::Element) % 16 == 0;

// Factors of the rows of a chunk, by what they are for. Rows past the end of a short chunk write nothing.
enum Factor {
    G2,           // log decay, base 2, summed from the start of the chunk, own row included
    BETA,         // write strength
    K_NORM,       // reciprocal length of the key, or 1
    Q_NORM,       // the same of the query
    FROM_STATE,   // beta gamma k_norm: of what a key reads from the state before the chunk
    TO_OUTPUT,    // scale gamma q_norm: of what a query reads there
    TO_STATE,     // k_norm e^{G_C - G_i}: of what a row adds to the state after the chunk
    GROWTH,       // log2 of the most that the token can stretch a state by, decay included
    FACTORS,
};

template <int C>
struct alignas(16) Factors {
    float at[FACTORS][C];
};

// Rows of the table of chunks, [NT, 2].
struct Chunk {
    i64 first;  // token
    i64 rows;
};

// Rows of the table of segments, [NS, 6]: chunks of one sequence that follow each other. Segments of a sequence follow each
// other too.
struct Segment {
    i64 bos, eos;  // tokens
    i64 chunk;     // the first
    i64 i_n;       // of the sequence
    i64 before;    // segments of the sequence before this one
    i64 after;     // and after it
};

template <int C>
__device__ i64 chunks_of(const Segment& segment) {
    return (segment.eos - segment.bos + C - 1) / C;
}

template <class T, bool PRESENT>
struct Maybe {
    T it;
};
template <class T>
struct Maybe<T, false> {};

// Multiplies the columns of a result by their factors.
template <int C>
__device__ void scale_columns(RegTile<16, C>& r, const float (&s_factor)[C]) {
    const int t = lane_id() % 4;
    #pragma unroll
    for (int j = 0; j < C / 8; ++j) {
        const float2 f = reinterpret_cast<const float2&>(s_factor[8 * j + 2 * t]);
        r.at[0][j][0] *= f.x;
        r.at[0][j][1] *= f.y;
        r.at[0][j][2] *= f.x;
        r.at[0][j][3] *= f.y;
    }
}

// a -= b
template <int C>
__device__ void subtract(RegTile<16, C>& a, const RegTile<16, C>& b) {
    #pragma unroll
    for (int j = 0; j < C / 8; ++j) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) a.at[0][j][e] -= b.at[0][j][e];
    }
}

// Starts to copy the factors of a chunk.
template <int THREADS, int C>
__device__ void load_factors(Factors<C>& s, const float* factors, int i_thread) {
    for (int i = i_thread * 4; i < FACTORS * C; i += THREADS * 4) cp_async_cg_16(&s.at[0][0] + i, factors + i, 16);
}

// Where two warps that have halves of K exchange sums.
template <int WARPS, int C>
struct Exchange {
    float at[WARPS][C / 2][32];
};

// r = the sum of r over the WK warps that share rows of V; warps i and i ^ 1 do. The whole block calls it.
template <int WK, int WARPS, int C>
__device__ void sum_over_k(RegTile<16, C>& r, Maybe<Exchange<WARPS, C>, (WK > 1)>& s) {
    if constexpr (WK > 1) {
        static_assert(WK == 2, "halves of K");
        const int i_warp = threadIdx.x / 32, lane = lane_id();
        #pragma unroll
        for (int j = 0; j < C / 8; ++j) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) s.it.at[i_warp][4 * j + e][lane] = r.at[0][j][e];
        }
        __syncthreads();  // the other half is there
        #pragma unroll
        for (int j = 0; j < C / 8; ++j) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) r.at[0][j][e] += s.it.at[i_warp ^ 1][4 * j + e][lane];
        }
        __syncthreads();  // it has been read
    }
}

// Where row k and column v of a state lie at the border: [K, V], or with VALUE_MAJOR [V, K].
template <class Cfg>
__device__ i64 state_place(int k, int v) {
    return Cfg::VALUE_MAJOR ? i64(v) * Cfg::K + k : i64(k) * Cfg::V + v;
}

// A slice of a state, rows i_v .. of S^T, from or to f32 at the border.
template <class Cfg, int KW>
__device__ void load_state(RegTile<16, KW>& r, const float* state, int i_v, int i_k) {
    for_each(r, [=](int row, int col, float& x) {
        const int v = i_v + row, k = i_k + col;
        x = state != nullptr && v < Cfg::V && k < Cfg::K ? state[state_place<Cfg>(k, v)] : 0.0f;
    });
}

// The same from rows [V, KW] that lie as the slice does, of which the first `rows` are there.
template <int KW>
__device__ void load_state_rows(RegTile<16, KW>& r, const float* state, int rows) {
    for_each(r, [=](int row, int col, float& x) { x = row < rows ? state[i64(row) * KW + col] : 0.0f; });
}

template <class Cfg, int KW>
__device__ void store_state(float* state, RegTile<16, KW>& r, int i_v, int i_k) {
    for_each(r, [=](int row, int col, float& x) {
        const int v = i_v + row, k = i_k + col;
        if (v < Cfg::V && k < Cfg::K) state[state_place<Cfg>(k, v)] = x;
    });
}

// How a segment changes a state, for sequences that are cut into several: S -> M S + N, and dS -> M^T dS + N' on the way
// back. Rows are columns of the state: N^T [V, K], then M^T [K, K], both padded. What M makes of any state may be so small
// that it is left out; then it is not there, and neither is what came before.
template <class Cfg>
inline constexpr int MAP_ROWS = PADDED_V<Cfg> + PADDED_K<Cfg>;

// A product of decays and steps that is taken for 0: log2 of it.
inline constexpr float VANISHED = -0x1.f8p+6f;  // -126

// How many of the last of `chunks`, or of the first, have steps that together leave nothing of a state; one more than there
// are when something is left. `s_count` hands the number round; the whole block calls it.
template <int C>
__device__ int chunks_to_walk(int& s_count, const float* growth, i64 stride, int chunks, bool from_start) {
    if (threadIdx.x < 32) {
        const int lane = lane_id();
        float before = 0.0f;
        int count = chunks + 1;
        for (int first = 0; first < chunks; first += 32) {
            // A chunk for each lane.
            const int i = first + lane;
            float sum = 0.0f;
            if (i < chunks) {
                const float* rows = growth + (from_start ? i : chunks - 1 - i) * stride;
                #pragma unroll 4
                for (int row = 0; row < C; row += 4) {
                    const Vec<float, 4> x = load_nc<4>(rows + row);
                    sum += (x.at[0] + x.at[1]) + (x.at[2] + x.at[3]);
                }
            }
            sum = before + group_prefix_sum<32>(sum);
            const u32 vanished = __ballot_sync(FULL_WARP, i < chunks && sum <= VANISHED);
            if (vanished != 0) {
                count = first + __ffs(vanished);
                break;
            }
            before = __shfl_sync(FULL_WARP, sum, 31);
        }
        if (lane == 0) s_count = count;
    }
    __syncthreads();  // the count is there
    return s_count;
}

// Room for a product with a map: a slice of the state, and a strip of the map. Both are pairs of bf16.
template <int ROWS, int K>
struct MapTiles {
    OperandTile<bf16, 2, ROWS, K> state;
    OperandTile<bf16, 2, 64, K> strip;
};

// r = r times a matrix [K, K] of f32 in global memory, or its transpose, a strip of 64 rows at a time. THREADS threads call it,
// of which this one is `i_thread`, and meet by `meet`; each warp has 16 rows.
template <int THREADS, bool TRANSPOSED, int ROWS, int K, class Meet>
__device__ void times_map(RegTile<16, K>& r, MapTiles<ROWS, K>& s, const float* matrix, int i_thread, Meet meet) {
    const int row0 = i_thread / 32 * 16;
    store(s.state, r, row0, 0);
    __syncwarp();  // the warp's rows are there
    zero(r);
    #pragma unroll
    for (int k = 0; k < K; k += 64) {
        meet();  // the last strip has been read
        load_rows<THREADS, true>(s.strip, matrix + i64(k) * K, K, 64, K, i_thread);
        meet();  // this one is there
        OperandA<bf16, 2, 16, 16> a;
        OperandB<bf16, 2, 16, 16> b;
        // Its rows are columns of the result when it is transposed, and of the slice when it is not.
        #pragma unroll 1
        for (int i = 0; i < (TRANSPOSED ? K : 64); i += 16) {
            load_a(a, s.state, row0, TRANSPOSED ? i : k + i);
            #pragma unroll
            for (int j = 0; j < (TRANSPOSED ? 64 : K) / 16; ++j) {
                if constexpr (TRANSPOSED) {
                    load_b_transposed(b, s.strip, 16 * j, i);
                    mma_block(r, k / 16 + j, a, 0, b);
                } else {
                    load_b(b, s.strip, i, 16 * j);
                    mma_block(r, j, a, 0, b);
                }
            }
        }
    }
    meet();  // the last strip has been read
}

// The same by the whole block.
template <int THREADS, bool TRANSPOSED, int ROWS, int K>
__device__ void times_map(RegTile<16, K>& r, MapTiles<ROWS, K>& s, const float* matrix) {
    times_map<THREADS, TRANSPOSED>(r, s, matrix, threadIdx.x, [] { __syncthreads(); });
}

// r += rows i_v .. of a matrix [.., K] of f32.
template <int K>
__device__ void add_rows(RegTile<16, K>& r, const float* matrix, int i_v) {
    for_each(r, [=](int row, int col, float& x) { x += matrix[i64(i_v + row) * K + col]; });
}

}  // namespace fla::gated_delta
