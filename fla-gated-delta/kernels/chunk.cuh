// chunk: what the passes by chunks share: the chunks and segments of tokens, the factors of a chunk's rows, and the parts of
// a scan that holds a slice of a state in registers.
//
// The scans hold states transposed, S^T [V, K]: it is then the left operand of every product with the state, in the lanes
// as it lies, and the right operands are chunks of tokens in shared memory.
#pragma once
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
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
    FACTORS = 8,  // one is not used
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

// Rows of the table of segments, [NS, 6]: chunks of one sequence that follow each other.
struct Segment {
    i64 bos, eos;  // tokens
    i64 chunk;     // the first
    i64 i_n;       // of the sequence
    i64 first;     // 1: it begins with the sequence
    i64 last;      // 1: it ends with the sequence
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

// A slice of a state, rows i_v .. of S^T, from or to [K, V] in f32.
template <int K, int V, int KW>
__device__ void load_state(RegTile<16, KW>& r, const float* state, int i_v, int i_k) {
    for_each(r, [=](int row, int col, float& x) {
        const int v = i_v + row, k = i_k + col;
        x = state != nullptr && v < V && k < K ? state[i64(k) * V + v] : 0.0f;
    });
}

template <int K, int V, int KW>
__device__ void store_state(float* state, RegTile<16, KW>& r, int i_v, int i_k) {
    for_each(r, [=](int row, int col, float& x) {
        const int v = i_v + row, k = i_k + col;
        if (v < V && k < K) state[i64(k) * V + v] = x;
    });
}

}  // namespace fla::gated_delta
