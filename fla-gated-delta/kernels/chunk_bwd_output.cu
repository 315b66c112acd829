// chunk_bwd_output: the gradients of a chunk, from the states around it and what its rows write.
//
//   dV = beta dX                                                                            (1)
//   dP = Gamma norms tril(dO V'^T)          dM = -Gamma norms stril(dX V'^T)                 (2)
//   dQ = to_output (dO S^T) + dP K                                                          (3)
//   dK = to_state (V' dS^T) - from_state (dX S^T) + dP^T Q + (D + D^T) K,  D = beta dM        (4)
//   dbeta_i = dX_i . V_i - gamma_i k_i . (dX S^T)_i + sum_j (dM K K^T)_ij                    (5)  elementwise product
//   dG_i = q_i . dQ'_i + k_i . dK''_i + (row - column sum)_i of dP Q K^T + D K K^T            (6)
//   dg_i = sum of dG from i on + sum of k . dK' before i + e^{G_C} S . dS                    (7)
//
// dQ' is the first term of (3), dK' and -dK'' those of (4); products with norms are of vectors as given, whose lengths'
// share is taken off last. Gamma, P and the factors of rows are those of `chunk_fwd_intra`.
//
// Reference  fla_reference::gated_delta::chunk_bwd
// Launch     grid at most NT * H, block 256: a block takes chunks of a query head in turn, each with all its value heads
// FLA        chunk_bwd_dqkwg, prepare_wy_repr_bwd, chunk_bwd_dv_local
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/scan.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>
#include <fla/gated_delta/chunk.cuh>
#include <fla/gated_delta/chunk_grads.cuh>
#include <fla/gated_delta/recurrent_fwd.cuh>

namespace fla::gated_delta {

template <class Element, class Work>
struct ChunkBwdOutputParams {
    const Element* q;      // [B, T, H, K]
    const Element* k;      // [B, T, H, K]
    const Element* v;      // [B, T, HV, V]
    const Element* beta;   // [B, T, HV]      as given
    const Element* d_o;    // [B, T, HV, V]
    const Work* states;    // [NT, HV, V, K]  padded; S^T before each chunk
    const Work* written;   // [NT, HV, V, C]  padded; V'^T
    const Work* d_states;  // [NT, HV, V, K]  padded; dS^T after each chunk
    const Work* dx;        // [NT, HV, V, C]  padded; dX^T
    const float* factors;  // [NT, HV, 8, C]
    const i64* chunks;     // [NT, 2]
    Element* dq;           // [B, T, H, K]
    Element* dk;           // [B, T, H, K]
    Element* dv;           // [B, T, HV, V]
    float* dg;             // [B, T, HV]      of the log decay; null: there is none
    Element* dbeta;        // [B, T, HV]      null: there is none
    i64 items;             // NT H
    i32 h;
    i32 hv;
    float scale;
};

template <class Cfg>
concept ChunkBwdOutputConfig = ChunkTiles<Cfg> && requires {
    Cfg::HEAD_BETA;     // a strength for each head
    Cfg::SIGMOID_BETA;  // strengths are logits
    Cfg::TWICE_BETA;    // strengths are doubled after that
    Cfg::NORMALISE_QK;  // q and k are divided by their lengths
    Cfg::BV;            // columns of the state that are in shared memory at once
    Cfg::STAGES;        // such slices that are there or on their way
    Cfg::GROUPED;       // value heads share a query head
};

inline constexpr int OUTPUT_WARPS = 8;  // two side by side over the rows of a chunk, four over K
inline constexpr int OUTPUT_THREADS = 32 * OUTPUT_WARPS;

// BV columns of what belongs to a value head.
template <ChunkBwdOutputConfig Cfg>
struct ChunkBwdOutputStage {
    template <int ROWS, int COLS>
    using Tile = OperandTile<typename Cfg::Half, Cfg::PARTS, ROWS, COLS>;
    Tile<Cfg::BV, PADDED_K<Cfg>> state;    // [BV, K]
    Tile<Cfg::BV, PADDED_K<Cfg>> d_state;  // [BV, K]
    Tile<Cfg::BV, Cfg::C> written;         // [BV, C]
    Tile<Cfg::BV, Cfg::C> dx;              // [BV, C]
    Tile<Cfg::C, Cfg::BV> d_o;             // [C, BV]
    Tile<Cfg::C, Cfg::BV> v;               // [C, BV]
};

// Sums along rows that four warps have parts of.
enum RowSum {
    OF_STATES,  // q . dQ'
    OF_READ,    // k . (dX S^T)
    OF_ADDED,   // k . dK'
    OF_SCORES,  // dP Q K^T + D K K^T
    OF_BETA,    // dM K K^T
    OF_Q,       // q . dQ
    OF_K,       // k . dK
    ROW_SUMS,
};

template <ChunkBwdOutputConfig Cfg>
struct ChunkBwdOutputShared {
    template <int COLS>
    using Tile = OperandTile<typename Cfg::Half, Cfg::PARTS, Cfg::C, COLS>;
    static constexpr int BUFFERS = min(Cfg::STAGES, 2);
    ChunkBwdOutputStage<Cfg> stages[Cfg::STAGES];
    Tile<PADDED_K<Cfg>> q[BUFFERS], k[BUFFERS];  // [C, K]
    Tile<Cfg::C> d_scores, d_keys;               // [C, C]  dP and D
    Factors<Cfg::C> factors[BUFFERS];
    float rows[ROW_SUMS][4][Cfg::C];
    float columns[2][Cfg::C];
    float d_beta[Cfg::PARTS == 1 ? 2 : 1][Cfg::C];  // dX . V, and dX . V' where operands are single 16-bit numbers
    float dots[OUTPUT_WARPS];  // S . dS
    // Sums over the value heads so far, for which registers have no room while slices are added: dq and dk.
    Maybe<float[2][Cfg::C * PADDED_K<Cfg> / OUTPUT_THREADS][OUTPUT_THREADS], Cfg::GROUPED> totals;
};

// A place in the walk over chunks of query heads, their value heads, and slices of those. It is made of the number of the
// step whenever it is needed: registers are few.
template <ChunkBwdOutputConfig Cfg>
struct OutputCursor {
    static constexpr int SLICES = ceil_div(Cfg::V, Cfg::BV), STAGES = Cfg::STAGES, BUFFERS = min(STAGES, 2);
    static_assert(STAGES - 1 <= SLICES, "the slices on their way belong to this head and the next");
    i64 item;
    int i_group, i_slice, stage, item_buffer, head_buffer;

    __device__ OutputCursor(u32 i_step, int group) {
        const u32 i_head = i_step / SLICES, i_item = Cfg::GROUPED ? i_head / group : i_head;
        item = blockIdx.x + i64(i_item) * gridDim.x;
        i_group = Cfg::GROUPED ? i_head % group : 0;
        i_slice = i_step % SLICES;
        stage = i_step % STAGES;
        head_buffer = i_head % BUFFERS;
        item_buffer = i_item % BUFFERS;
    }
};

template <ChunkBwdOutputConfig Cfg>
__device__ void load_slice(
    ChunkBwdOutputShared<Cfg>& s,
    const ChunkBwdOutputParams<typename Cfg::Element, typename Cfg::Work>& p,
    const OutputCursor<Cfg>& at
) {
    constexpr int C = Cfg::C, K = Cfg::K, V = Cfg::V, BV = Cfg::BV, THREADS = OUTPUT_THREADS;
    constexpr int ROWS = PADDED_V<Cfg>, COLS = PADDED_K<Cfg>;
    const i64 i_chunk = u64(at.item) / u32(p.h), i_h = u64(at.item) % u32(p.h);
    const Chunk chunk = reinterpret_cast<const Chunk*>(p.chunks)[i_chunk];
    const i64 i_hv = i_h * (u32(p.hv) / u32(p.h)) + at.i_group, tile = i_chunk * p.hv + i_hv;
    const int rows = int(chunk.rows), i_v = at.i_slice * BV, i_thread = threadIdx.x;
    auto& stage = s.stages[at.stage];
    if (at.i_slice == 0) {
        if (at.i_group == 0) {
            const i64 qk = (chunk.first * p.h + i_h) * K, stride = i64(p.h) * K;
            load_rows<THREADS, VECTORS_K<Cfg>>(s.q[at.item_buffer], p.q + qk, stride, rows, K, i_thread);
            load_rows<THREADS, VECTORS_K<Cfg>>(s.k[at.item_buffer], p.k + qk, stride, rows, K, i_thread);
        }
        load_factors<THREADS>(s.factors[at.head_buffer], p.factors + tile * (FACTORS * C), i_thread);
    }
    const i64 token = (chunk.first * p.hv + i_hv) * V + i_v, stride = i64(p.hv) * V;
    load_rows<THREADS, VECTORS_V<Cfg>>(stage.d_o, p.d_o + token, stride, rows, V - i_v, i_thread);
    load_rows<THREADS, VECTORS_V<Cfg>>(stage.v, p.v + token, stride, rows, V - i_v, i_thread);
    const i64 row = tile * ROWS + i_v;
    const int padded = min(BV, ROWS - i_v);
    load_rows<THREADS, true>(stage.state, p.states + row * COLS, COLS, padded, COLS, i_thread);
    load_rows<THREADS, true>(stage.d_state, p.d_states + row * COLS, COLS, padded, COLS, i_thread);
    load_rows<THREADS, true>(stage.written, p.written + row * C, C, padded, C, i_thread);
    load_rows<THREADS, true>(stage.dx, p.dx + row * C, C, padded, C, i_thread);
}

// Where a warp's parts of results lie, and what they are.
template <ChunkBwdOutputConfig Cfg>
struct OutputWarp {
    static constexpr int ROWS = Cfg::C / 2, COLS = PADDED_K<Cfg> / 4;
    int row0, col0;  // of its part of [C, K]
    int key0;        // of its part of [C, C], 16 columns
    int i_rows, i_columns;

    __device__ OutputWarp() {
        const int i_warp = threadIdx.x / 32;
        i_rows = i_warp / 4;
        i_columns = i_warp % 4;
        row0 = i_rows * ROWS;
        col0 = i_columns * COLS;
        key0 = i_columns * 16;
    }

    // Whether its part of [C, C] is there and not all above the diagonal.
    __device__ bool has_keys() const { return key0 < Cfg::C && key0 < row0 + ROWS; }
};

// What the slices of a value head add up to.
template <ChunkBwdOutputConfig Cfg>
struct OutputSums {
    using Warp = OutputWarp<Cfg>;
    RegTile<Warp::ROWS, Warp::COLS> dq;    // dO S^T
    RegTile<Warp::ROWS, Warp::COLS> dk;    // V' dS^T
    RegTile<Warp::ROWS, Warp::COLS> of_k;  // dX S^T
    RegTile<Warp::ROWS, 16> scores;        // dO V'^T
    RegTile<Warp::ROWS, 16> keys;          // dX V'^T
    float d_beta[Warp::ROWS / 8];          // dX . V
    float d_written[Warp::ROWS / 8];       // dX . V'
    float dot;                             // S . dS
};

// Adds a slice, and stores its part of (1).
template <ChunkBwdOutputConfig Cfg>
__device__ void add_slice(
    OutputSums<Cfg>& r,
    const ChunkBwdOutputStage<Cfg>& s,
    const float (&s_beta)[Cfg::C],
    typename Cfg::Element* dv,
    i64 dv_stride,
    int rows,
    int cols
) {
    using Half = typename Cfg::Half;
    constexpr int PARTS = Cfg::PARTS, BV = Cfg::BV, ROWS = OutputWarp<Cfg>::ROWS, COLS = OutputWarp<Cfg>::COLS;
    const OutputWarp<Cfg> warp;
    #pragma unroll 2
    for (int k = 0; k < BV; k += 16) {
        OperandA<Half, PARTS, ROWS, 16> r_do, r_dx, r_v;
        load_a(r_do, s.d_o, warp.row0, k);
        load_a_transposed(r_dx, s.dx, k, warp.row0);
        load_a_transposed(r_v, s.written, k, warp.row0);
        OperandB<Half, PARTS, 16, 16> b;
        #pragma unroll
        for (int j = 0; j < COLS / 16; ++j) {
            load_b(b, s.state, k, warp.col0 + 16 * j);
            mma_block(r.dq, j, r_do, 0, b);
            mma_block(r.of_k, j, r_dx, 0, b);
            load_b(b, s.d_state, k, warp.col0 + 16 * j);
            mma_block(r.dk, j, r_v, 0, b);
        }
        if (warp.has_keys()) {
            load_b(b, s.written, k, warp.key0);
            mma_block(r.scores, 0, r_do, 0, b);
            mma_block(r.keys, 0, r_dx, 0, b);
        }
        if (warp.i_columns == 2) {
            // (1)
            RegTile<ROWS, 16> x;
            widen(x, r_dx);
            scale_rows(x, s_beta, warp.row0);
            store_result<Cfg::V % 4 == 0>(dv + warp.row0 * dv_stride + k, dv_stride, x, rows - warp.row0, cols - k);
        } else if (Cfg::HEAD_BETA && warp.i_columns == 3) {
            RegTile<ROWS, 16> x, v;
            const auto add_dots = [&](float (&sums)[ROWS / 8]) {
                widen(v, r_v);
                #pragma unroll
                for (int i = 0; i < ROWS / 8; ++i) {
                    #pragma unroll
                    for (int e = 0; e < 4; ++e) {
                        const int j = e / 2, at = i % 2 * 2 + e % 2;
                        sums[i] = fmaf(x.at[i / 2][j][at], v.at[i / 2][j][at], sums[i]);
                    }
                }
            };
            widen(x, r_dx);
            if constexpr (PARTS == 1) add_dots(r.d_written);
            load_a(r_v, s.v, warp.row0, k);
            add_dots(r.d_beta);
        }
    }
    constexpr int PIECES = PADDED_K<Cfg> / 8;
    #pragma unroll 1
    for (int i = threadIdx.x; i < BV * PIECES; i += OUTPUT_THREADS) {
        float x[8], y[8];
        read_eight(x, s.state, i / PIECES, i % PIECES * 8);
        read_eight(y, s.d_state, i / PIECES, i % PIECES * 8);
        #pragma unroll
        for (int j = 0; j < 8; ++j) r.dot = fmaf(x[j], y[j], r.dot);
    }
}

// Puts the sums of the warp's rows where the other warps of the rows put theirs.
template <ChunkBwdOutputConfig Cfg, int N>
__device__ void put_rows(ChunkBwdOutputShared<Cfg>& s, RowSum which, const float (&r)[N]) {
    const OutputWarp<Cfg> warp;
    #pragma unroll
    for (int i = 0; i < N; ++i) {
        if (lane_id() % 4 == 0) s.rows[which][warp.i_columns][warp.row0 + 8 * i + lane_id() / 4] = r[i];
    }
}

// The terms of (3) and (4) with states, and their parts of (5) to (7). What was dO S^T becomes dQ, and V' dS^T dK.
template <ChunkBwdOutputConfig Cfg>
__device__ void add_states(OutputSums<Cfg>& r, ChunkBwdOutputShared<Cfg>& s, const OutputCursor<Cfg>& at) {
    constexpr int ROWS = OutputWarp<Cfg>::ROWS, COLS = OutputWarp<Cfg>::COLS;
    const OutputWarp<Cfg> warp;
    const auto& f = s.factors[at.head_buffer].at;
    const auto &s_q = s.q[at.item_buffer], &s_k = s.k[at.item_buffer];
    float of_q[ROWS / 8], of_added[ROWS / 8], of_read[ROWS / 8];
    scale_rows(r.dq, f[TO_OUTPUT], warp.row0);
    row_dots(of_q, r.dq, s_q, warp.row0, warp.col0);
    scale_rows(r.dk, f[TO_STATE], warp.row0);
    row_dots(of_added, r.dk, s_k, warp.row0, warp.col0);
    row_dots(of_read, r.of_k, s_k, warp.row0, warp.col0);
    scale_rows(r.of_k, f[FROM_STATE], warp.row0);
    put_rows<Cfg>(s, OF_STATES, of_q);
    put_rows<Cfg>(s, OF_ADDED, of_added);
    put_rows<Cfg>(s, OF_READ, of_read);
    #pragma unroll
    for (int i = 0; i < ROWS / 16; ++i) {
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) r.dk.at[i][j][e] -= r.of_k.at[i][j][e];
        }
    }
    if (Cfg::HEAD_BETA && warp.i_columns == 3) {
        #pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            const int row = warp.row0 + 8 * i + lane_id() / 4;
            const float sum = group_sum<4>(r.d_beta[i]);
            if (lane_id() % 4 == 0) s.d_beta[0][row] = sum;
            if constexpr (Cfg::PARTS == 1) {
                const float written = group_sum<4>(r.d_written[i]);
                if (lane_id() % 4 == 0) s.d_beta[1][row] = written;
            }
        }
    }
    const float dot = group_sum<32>(r.dot);
    if (lane_id() == 0) s.dots[threadIdx.x / 32] = dot;
}

// (2), and its parts of (5) and (6).
template <ChunkBwdOutputConfig Cfg>
__device__ void put_scores(
    OutputSums<Cfg>& r, ChunkBwdOutputShared<Cfg>& s, const OutputCursor<Cfg>& at, float scale
) {
    using Half = typename Cfg::Half;
    constexpr int PARTS = Cfg::PARTS, ROWS = OutputWarp<Cfg>::ROWS;
    const OutputWarp<Cfg> warp;
    const auto& f = s.factors[at.head_buffer].at;
    const auto &s_q = s.q[at.item_buffer], &s_k = s.k[at.item_buffer];
    float of_scores[ROWS / 8] = {}, of_beta[ROWS / 8] = {}, columns[4] = {};
    if (warp.has_keys()) {
        RegTile<ROWS, 16> r_qk, r_kk;
        zero(r_qk);
        zero(r_kk);
        #pragma unroll 1
        for (int k = 0; k < PADDED_K<Cfg>; k += 16) {
            OperandA<Half, PARTS, ROWS, 16> a;
            OperandB<Half, PARTS, 16, 16> b;
            load_b_transposed(b, s_k, warp.key0, k);
            load_a(a, s_q, warp.row0, k);
            mma_block(r_qk, 0, a, 0, b);
            load_a(a, s_k, warp.row0, k);
            mma_block(r_kk, 0, a, 0, b);
        }
        const int g = lane_id() / 4, t = lane_id() % 4;
        #pragma unroll
        for (int i = 0; i < ROWS / 8; ++i) {
            const int row = warp.row0 + 8 * i + g;
            const float g2 = f[G2][row], beta = f[BETA][row], k_norm = f[K_NORM][row], q_norm = f[Q_NORM][row] * scale;
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                const int j = e / 2, n = i % 2 * 2 + e % 2, col = warp.key0 + 8 * j + 2 * t + e % 2;
                const float decay = exp2_approx(g2 - f[G2][col]) * f[K_NORM][col];
                float& score = r.scores.at[i / 2][j][n];
                float& key = r.keys.at[i / 2][j][n];
                score = row >= col ? score * decay * q_norm : 0.0f;
                const float dm = row > col ? -key * decay * k_norm : 0.0f;
                key = beta * dm;
                const float of_beta_here = dm * r_kk.at[i / 2][j][n];
                // The diagonal is in both sums of (6), and would leave its rounding behind where all else has decayed.
                const float query = row > col ? score * r_qk.at[i / 2][j][n] : 0.0f;
                const float product = fmaf(beta, of_beta_here, query);
                of_beta[i] += of_beta_here;
                of_scores[i] += product;
                columns[e] += product;
            }
            of_scores[i] = group_sum<4>(of_scores[i]);
            of_beta[i] = group_sum<4>(of_beta[i]);
        }
        store(s.d_scores, r.scores, warp.row0, warp.key0);
        store(s.d_keys, r.keys, warp.row0, warp.key0);
    }
    put_rows<Cfg>(s, OF_SCORES, of_scores);
    put_rows<Cfg>(s, OF_BETA, of_beta);
    #pragma unroll
    for (int e = 0; e < 4; ++e) {
        const float sum = strided_sum<4>(columns[e]);
        if (warp.key0 < Cfg::C && lane_id() < 4) {
            s.columns[warp.i_rows][warp.key0 + e / 2 * 8 + 2 * lane_id() + e % 2] = sum;
        }
    }
}

// The terms of (3) and (4) with dP and D.
template <ChunkBwdOutputConfig Cfg>
__device__ void add_scores(OutputSums<Cfg>& r, const ChunkBwdOutputShared<Cfg>& s, const OutputCursor<Cfg>& at) {
    using Half = typename Cfg::Half;
    constexpr int PARTS = Cfg::PARTS, C = Cfg::C, ROWS = OutputWarp<Cfg>::ROWS, COLS = OutputWarp<Cfg>::COLS;
    const OutputWarp<Cfg> warp;
    const auto &s_q = s.q[at.item_buffer], &s_k = s.k[at.item_buffer];
    OperandA<Half, PARTS, ROWS, 16> a_scores, a_keys;
    OperandB<Half, PARTS, 16, 16> b;
    // Rows of both reach as far as the diagonal, columns begin there.
    #pragma unroll 1
    for (int k = 0; k < warp.row0 + ROWS; k += 16) {
        load_a(a_scores, s.d_scores, warp.row0, k);
        load_a(a_keys, s.d_keys, warp.row0, k);
        #pragma unroll
        for (int j = 0; j < COLS / 16; ++j) {
            load_b(b, s_k, k, warp.col0 + 16 * j);
            mma_block(r.dq, j, a_scores, 0, b);
            mma_block(r.dk, j, a_keys, 0, b);
        }
    }
    #pragma unroll 1
    for (int k = warp.row0; k < C; k += 16) {
        load_a_transposed(a_scores, s.d_scores, k, warp.row0);
        load_a_transposed(a_keys, s.d_keys, k, warp.row0);
        #pragma unroll
        for (int j = 0; j < COLS / 16; ++j) {
            load_b(b, s_q, k, warp.col0 + 16 * j);
            mma_block(r.dk, j, a_scores, 0, b);
            load_b(b, s_k, k, warp.col0 + 16 * j);
            mma_block(r.dk, j, a_keys, 0, b);
        }
    }
}

// (5) to (7). One warp calls it, a row or two for each lane.
template <ChunkBwdOutputConfig Cfg>
__device__ void store_gates(
    const ChunkBwdOutputParams<typename Cfg::Element, typename Cfg::Work>& p,
    const ChunkBwdOutputShared<Cfg>& s,
    const OutputCursor<Cfg>& at,
    const Chunk& chunk,
    i64 i_hv
) {
    constexpr int C = Cfg::C, N = C / 32;
    const auto& f = s.factors[at.head_buffer].at;
    const auto sum_of = [&](RowSum which, int row) {
        const auto& x = s.rows[which];
        return (x[0][row] + x[1][row]) + (x[2][row] + x[3][row]);
    };
    float dg[N], added[N];
    #pragma unroll
    for (int i = 0; i < N; ++i) {
        const int row = 32 * i + lane_id();
        const i64 to = (chunk.first + row) * p.hv + i_hv;
        const float of_read = sum_of(OF_READ, row);
        dg[i] = sum_of(OF_STATES, row) - f[FROM_STATE][row] * of_read;
        dg[i] += sum_of(OF_SCORES, row) - (s.columns[0][row] + s.columns[1][row]);
        added[i] = sum_of(OF_ADDED, row);
        if (Cfg::HEAD_BETA && row < chunk.rows) {
            const float gamma = exp2_approx(f[G2][row]) * f[K_NORM][row];
            // V' = beta times what the sum is of, and no difference of larger terms; only strengths near 0 do without it.
            const float beta = f[BETA][row];
            float dbeta = s.d_beta[0][row] - gamma * of_read + sum_of(OF_BETA, row);
            if constexpr (Cfg::PARTS == 1) {
                if (fabsf(beta) > LEAST_BETA) dbeta = s.d_beta[1][row] / beta;
            }
            if (Cfg::SIGMOID_BETA) {
                const float y = sigmoid(to_f32(p.beta[to]));
                dbeta *= (Cfg::TWICE_BETA ? 2.0f : 1.0f) * y * (1.0f - y);
            }
            p.dbeta[to] = from_f32<typename Cfg::Element>(dbeta);
        }
    }
    if (p.dg == nullptr) return;
    float dot = 0.0f;
    #pragma unroll
    for (int w = 0; w < OUTPUT_WARPS; ++w) dot += s.dots[w];
    const float of_states = exp2_approx(f[G2][C - 1]) * dot;
    row_suffix_sum(dg);
    // What a row adds to the state after the chunk decays by the rows after it. As a difference of sums from both ends, the
    // last row's share would leave its rounding behind.
    float before[N];
    #pragma unroll
    for (int i = 0; i < N; ++i) before[i] = added[i];
    row_prefix_sum(before);
    #pragma unroll
    for (int i = 0; i < N; ++i) {
        const int row = 32 * i + lane_id();
        float excluded = __shfl_up_sync(FULL_WARP, before[i], 1);
        if (lane_id() == 0) excluded = i == 0 ? 0.0f : before[i] - added[i];
        const float sum = dg[i] + (excluded + of_states);
        if (row < chunk.rows) p.dg[(chunk.first + row) * p.hv + i_hv] = sum;
    }
}

// Takes off the share of the vectors' lengths: x -= v norm^2 (v . x), for a gradient that has the norm in it.
template <ChunkBwdOutputConfig Cfg>
__device__ void take_off_length(
    RegTile<OutputWarp<Cfg>::ROWS, OutputWarp<Cfg>::COLS>& x,
    const OperandTile<typename Cfg::Half, Cfg::PARTS, Cfg::C, PADDED_K<Cfg>>& s_v,
    const float (&s_norm)[Cfg::C],
    const float (&s_sums)[4][Cfg::C]
) {
    constexpr int ROWS = OutputWarp<Cfg>::ROWS, COLS = OutputWarp<Cfg>::COLS;
    const OutputWarp<Cfg> warp;
    const int g = lane_id() / 4, t = lane_id() % 4;
    #pragma unroll
    for (int i = 0; i < ROWS / 8; ++i) {
        const int row = warp.row0 + 8 * i + g;
        const float sum = (s_sums[0][row] + s_sums[1][row]) + (s_sums[2][row] + s_sums[3][row]);
        const float factor = s_norm[row] * s_norm[row] * sum;
        #pragma unroll
        for (int j = 0; j < COLS / 8; ++j) {
            const float2 v = read_pair(s_v, row, warp.col0 + 8 * j + 2 * t);
            float* y = &x.at[i / 2][j][i % 2 * 2];
            y[0] = fmaf(-factor, v.x, y[0]);
            y[1] = fmaf(-factor, v.y, y[1]);
        }
    }
}

// Calls f(number, total) for what this thread has of a sum over value heads.
template <int ROWS, int COLS, int THREADS, class F>
__device__ void for_totals(RegTile<ROWS, COLS>& r, float (&s_totals)[ROWS * COLS / 32][THREADS], F f) {
    #pragma unroll
    for (int i = 0; i < ROWS * COLS / 32; ++i) {
        f(r.at[i / 4 / (COLS / 8)][i / 4 % (COLS / 8)][i % 4], s_totals[i][threadIdx.x]);
    }
}

template <ChunkBwdOutputConfig Cfg>
__device__ void chunk_bwd_output(const ChunkBwdOutputParams<typename Cfg::Element, typename Cfg::Work>& p) {
    using Warp = OutputWarp<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V, BV = Cfg::BV, STAGES = Cfg::STAGES, ROWS = Warp::ROWS;
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkBwdOutputShared<Cfg>*>(s_bytes);
    const int group = Cfg::GROUPED ? u32(p.hv) / u32(p.h) : 1;
    const Warp warp;

    const auto load = [&](u32 i_step) {
        const OutputCursor<Cfg> at(i_step, group);
        if (at.item < p.items) load_slice<Cfg>(s, p, at);
        cp_async_commit_group();
    };
    #pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) load(i);
    // One loop over chunks and value heads: in two, addresses that stay the same for a chunk would take all registers.
    for (u32 i_step = 0;;) {
        const OutputCursor<Cfg> head(i_step, group);
        if (head.item >= p.items) break;
        const i64 i_h = u64(head.item) % u32(p.h), i_hv = i_h * group + head.i_group;
        const Chunk chunk = reinterpret_cast<const Chunk*>(p.chunks)[u64(head.item) / u32(p.h)];
        const i64 token = (chunk.first * p.hv + i_hv) * V;
        OutputSums<Cfg> r = {};
        #pragma unroll 1
        for (int i_v = 0; i_v < V; i_v += BV, ++i_step) {
            if constexpr (STAGES == 1) {
                __syncthreads();  // the last slice, and all that was made of it, has been read
                load(i_step);
                cp_async_wait_group<0>();
                __syncthreads();  // the slice is there
            } else {
                cp_async_wait_group<STAGES - 2>();
                __syncthreads();  // the slice is there; the last one, and all that was made of it, has been read
                load(i_step + STAGES - 1);
            }
            add_slice<Cfg>(
                r, s.stages[i_step % STAGES], s.factors[head.head_buffer].at[BETA], p.dv + token + i_v, i64(p.hv) * V,
                int(chunk.rows), V - i_v
            );
        }
        add_states<Cfg>(r, s, head);
        put_scores<Cfg>(r, s, head, p.scale);
        __syncthreads();  // dP, D and sums are there
        add_scores<Cfg>(r, s, head);
        if (threadIdx.x < 32) store_gates<Cfg>(p, s, head, chunk, i_hv);
        if constexpr (Cfg::GROUPED) {
            const auto add = [&](float& x, float& total) { total = x += head.i_group > 0 ? total : 0.0f; };
            for_totals(r.dq, s.totals.it[0], add);
            for_totals(r.dk, s.totals.it[1], add);
            if (head.i_group + 1 < group) continue;
        }
        if constexpr (Cfg::NORMALISE_QK) {
            const auto &s_q = s.q[head.item_buffer], &s_k = s.k[head.item_buffer];
            float sums[ROWS / 8];
            row_dots(sums, r.dq, s_q, warp.row0, warp.col0);
            put_rows<Cfg>(s, OF_Q, sums);
            row_dots(sums, r.dk, s_k, warp.row0, warp.col0);
            put_rows<Cfg>(s, OF_K, sums);
            __syncthreads();  // both sums are there
            // All value heads of the group have the norms of their query head.
            const auto& f = s.factors[head.head_buffer].at;
            take_off_length<Cfg>(r.dq, s_q, f[Q_NORM], s.rows[OF_Q]);
            take_off_length<Cfg>(r.dk, s_k, f[K_NORM], s.rows[OF_K]);
        }
        const i64 to = ((chunk.first + warp.row0) * p.h + i_h) * K + warp.col0, stride = i64(p.h) * K;
        const int rows = int(chunk.rows) - warp.row0, cols = K - warp.col0;
        store_result<K % 4 == 0>(p.dq + to, stride, r.dq, rows, cols);
        store_result<K % 4 == 0>(p.dk + to, stride, r.dk, rows, cols);
    }
    cp_async_wait_group<0>();
}

}  // namespace fla::gated_delta
