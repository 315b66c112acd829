// chunk_bwd_sm90: the gradients of the states from the last chunk to the first, and with them those of each chunk.
//
//   dV' = P^T dO + to_state (K dS)       dX = T^T dV'       dV = beta dX                                     (1)
//   dS <- e^{G_C} dS + Q^T (to_output dO) - K^T (from_state dX)                                             (2)
//   dP = Gamma norms tril(dO V'^T)          dM = -Gamma norms stril(dX V'^T)          D = beta dM            (3)
//   dQ = to_output (dO S^T) + dP K                                                                          (4)
//   dK = to_state (V' dS^T) - from_state (dX S^T) + dP^T Q + (D + D^T) K                                     (5)
//   dbeta_i = dX_i . V'_i / beta_i                                                                          (6)
//   dG_i = q_i . dQ'_i + k_i . dK''_i + (row - column sum)_i of dP Q K^T + D K K^T                            (7)
//   dg_i = sum of dG from i on + sum of k . dK' before i + e^{G_C} S . dS                                    (8)
//
// It does what `chunk_bwd_state` and `chunk_bwd_output` do, whose gradients of states and of what rows write stay in shared
// memory; T, P, S and V' come from the forward pass. dQ' is the first term of (4), dK' and -dK'' those of (5). Two
// warpgroups have halves of V in (1) and (2), then one makes (4) and the other (5); a third copies, and finishes (6) to (8).
// Where value heads share a query head, dQ and dK are those of each value head, which `chunk_bwd_output_sm90` adds up.
//
// Reference  fla_reference::gated_delta::chunk_bwd
// Launch     grid NS * HV, block 384: a block walks a segment with a whole state
// FLA        chunk_gated_delta_rule_bwd_dhu, chunk_bwd_dqkwg, prepare_wy_repr_bwd, chunk_bwd_dv_local
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/scan.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/tma.cuh>
#include <fla/core/warp.cuh>
#include <fla/core/wgmma.cuh>
#include <fla/gated_delta/chunk.cuh>
#include <fla/gated_delta/chunk_grads.cuh>
#include <fla/gated_delta/chunk_rows.cuh>
#include <fla/gated_delta/chunk_wgmma.cuh>

namespace fla::gated_delta {

template <class Element, class Work>
struct ChunkBwdParams {
    TensorMap q;                  // [B T, H K]       boxes of [C, 64], as k and d_o
    TensorMap k;                  // [B T, H K]
    TensorMap d_o;                // [B T, HV V]
    TensorMap states;             // [NT HV V, K]     boxes of [V, 64]; S^T before each chunk
    TensorMap written;            // [NT HV V, C]     a box of [V, 64]; V'^T
    TensorMap inverse;            // [NT HV C, C]     a box of [C, 64]; T
    TensorMap scores;             // [NT HV C, C]     the same; P
    const Element* v;             // [B, T, HV, V]    read where a strength is next to 0
    const Element* beta;          // [B, T, HV]       as given
    const float* factors;         // [NT, HV, 8, C]
    const i64* segments;          // [NS, 6]
    const float* d_final_state;   // [N, HV, K, V]    or [N, HV, V, K]; null: zero
    const float* d_ends;          // [NS, HV, V, K]   gradients of states after segments; null where no sequence is cut
    float* d_initial_state;       // the same         null: not wanted
    Element* dq;                  // [B, T, H, K]     of each value head, [B, T, HV, K], where they share query heads
    Element* dk;                  // [B, T, H, K]     the same
    Element* dv;                  // [B, T, HV, V]
    float* dg;                    // [B, T, HV]       of the log decay; null: there is none
    Element* dbeta;               // [B, T, HV]       null: there is none
    i32 h;
    i32 hv;
    float scale;
};

template <class Cfg>
concept ChunkBwdConfig = ChunkTiles<Cfg> && requires {
    Cfg::HEAD_BETA;     // a strength for each head
    Cfg::SIGMOID_BETA;  // strengths are logits
    Cfg::TWICE_BETA;    // strengths are doubled after that
    Cfg::NORMALISE_QK;  // q and k are divided by their lengths
    Cfg::VALUE_MAJOR;   // states at the border are [V, K]
    Cfg::GROUPED;       // value heads share a query head
};

// Sums along the rows of a chunk.
enum BwdSum {
    OF_STATES,   // q . dQ'
    OF_READ,     // k . (dX S^T)
    OF_ADDED,    // k . dK'
    OF_SCORES,   // dP Q K^T + D K K^T
    OF_BETA,     // dM K K^T
    OF_WRITTEN,  // dX . V'
    BWD_SUMS,
};

template <int C>
struct BwdSums {
    float rows[BWD_SUMS][C];
    float columns[4][C];  // of what OF_SCORES has along rows, by warp
    float values[8][C];   // dX . V by warp, where a strength is next to 0
    float dots[8];        // S . dS by warp
};

inline constexpr int BWD_STAGES = 2, BWD_V = 128;

// Where a block works: a segment of a head, from its last chunk to its first.
struct ChunkBwdWalk {
    i32 bos, eos, chunk;  // the host keeps tokens below 2^31
    i32 chunks;
    i32 i_hv;

    template <class Cfg, class Params>
    __device__ static ChunkBwdWalk of_block(const Params& p) {
        const Segment& segment = reinterpret_cast<const Segment*>(p.segments)[blockIdx.x / u32(p.hv)];
        ChunkBwdWalk r;
        r.bos = i32(segment.bos);
        r.eos = i32(segment.eos);
        r.chunk = i32(segment.chunk);
        r.chunks = i32(chunks_of<Cfg::C>(segment));
        r.i_hv = blockIdx.x % u32(p.hv);
        return r;
    }

    template <int C>
    __device__ Chunk chunk_at(int i_step) const {
        const i32 first = bos + (chunks - 1 - i_step) * C;
        return {first, min(C, eos - first)};
    }

    __device__ i64 tile_at(int i_step, i32 hv) const { return i64(chunk + (chunks - 1 - i_step)) * hv + i_hv; }
};

template <ChunkBwdConfig Cfg>
struct ChunkBwdShared {
    template <int ROWS, int COLS>
    using Tile = OperandTile<typename Cfg::Half, 1, ROWS, COLS>;
    static constexpr int C = Cfg::C, K = Cfg::K;
    Tile<C, K> q[BWD_STAGES], k[BWD_STAGES];  // [C, K]
    Tile<C, BWD_V> d_o[BWD_STAGES];           // [C, V]
    Tile<BWD_V, K> state, d_state;            // [V, K]
    Tile<BWD_V, C> written, dx;               // [V, C]  V', then dP and D; dX, then dK
    Tile<C, C> inverse, scores;               // [C, C]  T and P
    Factors<C> factors[BWD_STAGES];
    BwdSums<C> sums[BWD_STAGES];
    // Copies of a chunk have come, in four parts, and their places are free again.
    Barrier loaded[BWD_STAGES], loaded_matrices, loaded_states, loaded_written;
    Barrier free[BWD_STAGES], free_matrices, free_states, free_written;
    // Sums are there; dX is, and dV has been made of it.
    Barrier summed[BWD_STAGES], solved, stored;
    ChunkBwdWalk walk;  // here, because registers are few
};

inline constexpr int WARPGROUP = 128, CONSUMERS = 256;
inline constexpr int BAR_CONSUMERS = 1, BAR_QUERIES = 2, BAR_KEYS = 3, BAR_WRITTEN = 4;  // 0 is the block's

// Copies chunk after chunk. One thread calls it.
template <ChunkBwdConfig Cfg>
__device__ void copy_chunks(ChunkBwdShared<Cfg>& s, const ChunkBwdParams<typename Cfg::Element, typename Cfg::Work>& p) {
    constexpr int C = Cfg::C, K = Cfg::K, V = BWD_V;
    const ChunkBwdWalk& walk = s.walk;
    // The query head, where it is not the value head.
    const i32 i_h = Cfg::GROUPED ? i32(u32(walk.i_hv) / (u32(p.hv) / u32(p.h))) : 0;
    for (int i_step = 0; i_step < walk.chunks; ++i_step) {
        const int i_stage = i_step % BWD_STAGES;
        const u32 round = i_step / BWD_STAGES;
        const i32 first = i32(walk.chunk_at<C>(i_step).first);
        const i64 tile = walk.tile_at(i_step, p.hv);
        Barrier& bar = s.loaded[i_stage];
        if (round > 0) mbarrier_wait_parity(s.free[i_stage], (round - 1) & 1);
        mbarrier_arrive_expect_tx(bar, (2 * K + V) * C * 2 + sizeof(Factors<C>));
        #pragma unroll
        for (int col = 0; col < K; col += 64) {
            const int x = (Cfg::GROUPED ? i_h : walk.i_hv) * K + col;
            cp_async_bulk_tensor_2d_shared_global(&s.k[i_stage].part[0].at(0, col), p.k, x, first, bar);
            cp_async_bulk_tensor_2d_shared_global(&s.q[i_stage].part[0].at(0, col), p.q, x, first, bar);
        }
        #pragma unroll
        for (int col = 0; col < V; col += 64) {
            const int x = walk.i_hv * V + col;
            cp_async_bulk_tensor_2d_shared_global(&s.d_o[i_stage].part[0].at(0, col), p.d_o, x, first, bar);
        }
        cp_async_bulk_shared_global(&s.factors[i_stage], p.factors + tile * (FACTORS * C), sizeof(Factors<C>), bar);

        if (i_step > 0) mbarrier_wait_parity(s.free_matrices, (i_step - 1) & 1);
        mbarrier_arrive_expect_tx(s.loaded_matrices, 2 * C * C * 2);
        cp_async_bulk_tensor_2d_shared_global(&s.inverse, p.inverse, 0, i32(tile * C), s.loaded_matrices);
        cp_async_bulk_tensor_2d_shared_global(&s.scores, p.scores, 0, i32(tile * C), s.loaded_matrices);

        if (i_step > 0) mbarrier_wait_parity(s.free_states, (i_step - 1) & 1);
        mbarrier_arrive_expect_tx(s.loaded_states, K * V * 2);
        #pragma unroll
        for (int col = 0; col < K; col += 64) {
            cp_async_bulk_tensor_2d_shared_global(
                &s.state.part[0].at(0, col), p.states, col, i32(tile * V), s.loaded_states
            );
        }
        if (i_step > 0) mbarrier_wait_parity(s.free_written, (i_step - 1) & 1);
        mbarrier_arrive_expect_tx(s.loaded_written, C * V * 2);
        cp_async_bulk_tensor_2d_shared_global(&s.written, p.written, 0, i32(tile * V), s.loaded_written);
    }
}

// (6) to (8), chunk after chunk. One warp calls it, two rows for each lane.
template <ChunkBwdConfig Cfg>
__device__ void store_gates(ChunkBwdShared<Cfg>& s, const ChunkBwdParams<typename Cfg::Element, typename Cfg::Work>& p) {
    constexpr int C = Cfg::C, N = C / 32;
    const ChunkBwdWalk& walk = s.walk;
    for (int i_step = 0; i_step < walk.chunks; ++i_step) {
        const int i_stage = i_step % BWD_STAGES;
        const u32 round = i_step / BWD_STAGES;
        const Chunk chunk = walk.chunk_at<C>(i_step);
        mbarrier_wait_parity(s.loaded[i_stage], round & 1);
        mbarrier_wait_parity(s.summed[i_stage], round & 1);
        const auto& f = s.factors[i_stage].at;
        const BwdSums<C>& sums = s.sums[i_stage];
        float dg[N], added[N];
        #pragma unroll
        for (int i = 0; i < N; ++i) {
            const int row = 32 * i + lane_id();
            const i64 to = (chunk.first + row) * p.hv + walk.i_hv;
            const float of_read = sums.rows[OF_READ][row];
            dg[i] = sums.rows[OF_STATES][row] - f[FROM_STATE][row] * of_read;
            dg[i] += sums.rows[OF_SCORES][row]
                - ((sums.columns[0][row] + sums.columns[1][row]) + (sums.columns[2][row] + sums.columns[3][row]));
            added[i] = sums.rows[OF_ADDED][row];
            if (Cfg::HEAD_BETA && row < chunk.rows) {
                // V' = beta times what the sum is of, and no difference of larger terms; only strengths near 0 do without it.
                const float beta = f[BETA][row];
                float dbeta = sums.rows[OF_WRITTEN][row] / beta;
                if (fabsf(beta) <= LEAST_BETA) {
                    float of_values = 0.0f;
                    #pragma unroll
                    for (int w = 0; w < 8; ++w) of_values += sums.values[w][row];
                    const float gamma = exp2_approx(f[G2][row]) * f[K_NORM][row];
                    dbeta = of_values - gamma * of_read + sums.rows[OF_BETA][row];
                }
                if (Cfg::SIGMOID_BETA) {
                    const float y = sigmoid(to_f32(p.beta[to]));
                    dbeta *= (Cfg::TWICE_BETA ? 2.0f : 1.0f) * y * (1.0f - y);
                }
                p.dbeta[to] = from_f32<typename Cfg::Element>(dbeta);
            }
        }
        if (p.dg != nullptr) {
            float dot = 0.0f;
            #pragma unroll
            for (int w = 0; w < 8; ++w) dot += sums.dots[w];
            const float of_states = exp2_approx(f[G2][C - 1]) * dot;
            row_suffix_sum(dg);
            // What a row adds to the state after the chunk decays by the rows after it. As a difference of sums from both
            // ends, the last row's share would leave its rounding behind.
            float before[N];
            #pragma unroll
            for (int i = 0; i < N; ++i) before[i] = added[i];
            row_prefix_sum(before);
            #pragma unroll
            for (int i = 0; i < N; ++i) {
                const int row = 32 * i + lane_id();
                float excluded = __shfl_up_sync(FULL_WARP, before[i], 1);
                if (lane_id() == 0) excluded = i == 0 ? 0.0f : before[i] - added[i];
                if (row < chunk.rows) p.dg[(chunk.first + row) * p.hv + walk.i_hv] = dg[i] + (excluded + of_states);
            }
        }
        mbarrier_arrive(s.free[i_stage]);
    }
}

// dV = beta dX, chunk after chunk. Two warps call it, each for half of the rows.
template <ChunkBwdConfig Cfg>
__device__ void store_values(ChunkBwdShared<Cfg>& s, const ChunkBwdParams<typename Cfg::Element, typename Cfg::Work>& p) {
    constexpr int C = Cfg::C, V = BWD_V;
    const ChunkBwdWalk& walk = s.walk;
    for (int i_step = 0; i_step < walk.chunks; ++i_step) {
        const int i_stage = i_step % BWD_STAGES;
        const Chunk chunk = walk.chunk_at<C>(i_step);
        mbarrier_wait_parity(s.loaded[i_stage], i_step / BWD_STAGES & 1);
        mbarrier_wait_parity(s.solved, i_step & 1);
        const i64 stride = i64(p.hv) * V;
        #pragma unroll 1
        for (int row0 = threadIdx.x / 32 % 2 * 32, i = 0; i < 2; ++i, row0 += 16) {
            const int row = row0 + lane_id() / 4;
            typename Cfg::Element* dv = p.dv + ((chunk.first + row) * p.hv + walk.i_hv) * V + lane_id() % 4 * 2;
            const float beta[2] = {s.factors[i_stage].at[BETA][row], s.factors[i_stage].at[BETA][row + 8]};
            #pragma unroll 1
            for (int i_v = 0; i_v < V; i_v += 16) {
                OperandA<typename Cfg::Half, 1, 16, 16> a;
                load_a_transposed(a, s.dx, i_v, row0);
                #pragma unroll
                for (int e = 0; e < 4; ++e) {
                    u32& pair = a.part[0].at[0][0][e];
                    const float2 x = unpack2<typename Cfg::Half>(pair);
                    pair = pack2<typename Cfg::Half>(beta[e % 2] * x.x, beta[e % 2] * x.y);
                }
                #pragma unroll
                for (int e = 0; e < 4; ++e) {
                    if (row + e % 2 * 8 < chunk.rows) {
                        st_global(dv + (e % 2 * 8) * stride + (i_v + e / 2 * 8), Words<1>{a.part[0].at[0][0][e]});
                    }
                }
            }
        }
        mbarrier_arrive(s.stored);
        mbarrier_arrive(s.free[i_stage]);
    }
}

// s[rows ..] = 0, by the consumers: rows past the end of a sequence are those of the next.
template <class Half, int ROWS, int COLS>
__device__ void clear_rows(OperandTile<Half, 1, ROWS, COLS>& s, int rows) {
    constexpr int PIECES = COLS / 8;
    for (int i = rows * PIECES + threadIdx.x - WARPGROUP; i < ROWS * PIECES; i += CONSUMERS) {
        reinterpret_cast<Words<4>&>(s.part[0].at(i / PIECES, i % PIECES * 8)) = {};
    }
}

// Multiplies the columns of a left operand by their factors, negated or not.
template <class Half, int C>
__device__ void scale_operand(OperandA<Half, 1, 16, C>& a, const float (&s_factor)[C]) {
    const int t = lane_id() % 4;
    #pragma unroll
    for (int j = 0; j < C / 8; ++j) {
        const float2 f = reinterpret_cast<const float2&>(s_factor[8 * j + 2 * t]);
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
            u32& pair = a.part[0].at[0][j / 2][j % 2 * 2 + e];
            const float2 x = unpack2<Half>(pair);
            pair = pack2<Half>(f.x * x.x, f.y * x.y);
        }
    }
}

// What rounding took off: a = x - b in 16 bits.
template <class Half, int C>
__device__ void narrow_rest(OperandA<Half, 1, 16, C>& a, const RegTile<16, C>& x, const OperandA<Half, 1, 16, C>& b) {
    #pragma unroll
    for (int j = 0; j < C / 8; ++j) {
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float2 y = unpack2<Half>(b.part[0].at[0][j / 2][j % 2 * 2 + e]);
            const float* pair = &x.at[0][j][2 * e];
            a.part[0].at[0][j / 2][j % 2 * 2 + e] = pack2<Half>(pair[0] - y.x, pair[1] - y.y);
        }
    }
}

// dX . V of a chunk's rows, for what a warp has of V.
template <ChunkBwdConfig Cfg>
__device__ void put_values(
    BwdSums<Cfg::C>& s, const RegTile<16, Cfg::C>& r_x, const typename Cfg::Element* v, i64 stride, int rows, int i_warp
) {
    #pragma unroll
    for (int j = 0; j < Cfg::C / 8; ++j) {
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int col = 8 * j + lane_id() % 4 * 2 + e;
            float sum = 0.0f;
            if (col < rows) {
                const typename Cfg::Element* at = v + col * stride + lane_id() / 4;
                sum = fmaf(r_x.at[0][j][e], to_f32(at[0]), r_x.at[0][j][2 + e] * to_f32(at[8]));
            }
            sum = strided_sum<4>(sum);
            if (lane_id() < 4) s.values[i_warp][col] = sum;
        }
    }
}

// The warp's share of S . dS, with what is multiplied elsewhere too: dS in 16 bits.
template <class Half, int K>
__device__ float dot_states(const OperandA<Half, 1, 16, K>& r_s, const OperandTile<Half, 1, BWD_V, K>& s, int row0) {
    const u32 place = lane_place(row0);
    float dot[2] = {};
    #pragma unroll
    for (int j = 0; j < K / 8; ++j) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float2 x = unpack2<Half>(pair_at(s, place, i, j));
            const float2 y = unpack2<Half>(r_s.part[0].at[0][j / 2][j % 2 * 2 + i]);
            dot[i] = fmaf(x.x, y.x, fmaf(x.y, y.y, dot[i]));
        }
    }
    return group_sum<32>(dot[0] + dot[1]);
}

// Puts what four neighbouring lanes have of a warp's rows.
template <int C>
__device__ void put_rows(float (&s_sums)[C], const float (&r)[2], int row0) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (lane_id() % 4 == 0) s_sums[row0 + 8 * i + lane_id() / 4] = r[i];
    }
}

// Puts the sums of a warp's columns, or adds them.
template <bool ADD, int C>
__device__ void put_columns(float (&s_sums)[C], const float (&columns)[C / 8][2]) {
    #pragma unroll
    for (int j = 0; j < C / 8; ++j) {
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float sum = strided_sum<4>(columns[j][e]);
            float& to = s_sums[8 * j + 2 * (lane_id() % 4) + e];
            if (lane_id() < 4) to = ADD ? to + sum : sum;
        }
    }
}

// Takes off the share of the vectors' lengths: x -= v norm^2 (v . x), for a gradient that has the norm in it.
template <class Half, int C, int K>
__device__ void take_off_length(
    RegTile<16, K>& x, const OperandTile<Half, 1, C, K>& s_v, const float (&s_norm)[C], int row0
) {
    float sums[2];
    row_dots_at(sums, x, s_v, row0, 0);
    const u32 place = lane_place(row0);
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = row0 + 8 * i + lane_id() / 4;
        const float factor = s_norm[row] * s_norm[row] * sums[i];
        #pragma unroll
        for (int j = 0; j < K / 8; ++j) {
            const float2 v = unpack2<Half>(pair_at(s_v, place, i, j));
            x.at[0][j][2 * i] = fmaf(-factor, v.x, x.at[0][j][2 * i]);
            x.at[0][j][2 * i + 1] = fmaf(-factor, v.y, x.at[0][j][2 * i + 1]);
        }
    }
}

// Memory of one tile as that of another.
template <int ROWS, int COLS, class Half, int S_ROWS, int S_COLS>
__device__ OperandTile<Half, 1, ROWS, COLS>& as_rows(OperandTile<Half, 1, S_ROWS, S_COLS>& s) {
    static_assert(sizeof(OperandTile<Half, 1, ROWS, COLS>) <= sizeof(s), "the tile fits");
    return reinterpret_cast<OperandTile<Half, 1, ROWS, COLS>&>(s);
}

// dP and D, in the place of V'.
template <ChunkBwdConfig Cfg>
__device__ auto& d_matrices(ChunkBwdShared<Cfg>& s) {
    using Pair = OperandTile<typename Cfg::Half, 1, Cfg::C, Cfg::C>[2];
    static_assert(sizeof(Pair) <= sizeof(s.written), "both fit");
    return reinterpret_cast<Pair&>(s.written);
}

// Stores the rows of a chunk in [B, T, h, K], head i_hv, by way of shared memory: whole rows, and few registers. A warpgroup calls it.
template <class Element, class Half, int C, int K>
__device__ void store_whole(
    Element* to, i32 h, OperandTile<Half, 1, C, K>& s, const RegTile<16, K>& r, const ChunkBwdWalk& walk, int i_step, int bar
) {
    store_result_at(s, r, threadIdx.x / 32 % 4 * 16);
    // For the copies that come to this place; after the stores to global memory it would wait for these.
    fence_proxy_async();
    bar_sync(bar, WARPGROUP);  // all rows are there
    const Chunk chunk = walk.chunk_at<C>(i_step);
    Element* dst = to + (chunk.first * h + walk.i_hv) * K;
    store_rows<WARPGROUP>(dst, i64(h) * K, s.part[0], int(chunk.rows), fresh(threadIdx.x % WARPGROUP));
}

// (3), (4) and their parts of (6) and (7): one warpgroup, 16 rows of a chunk for each warp.
template <ChunkBwdConfig Cfg>
__device__ void queries(
    ChunkBwdShared<Cfg>& s, const ChunkBwdParams<typename Cfg::Element, typename Cfg::Work>& p, int of_step, int i_step
) {
    // Once more, so that descriptors are made here and not kept.
    const int i_stage = __shfl_sync(FULL_WARP, fresh(of_step), 0);
    constexpr int C = Cfg::C, K = Cfg::K, V = BWD_V;
    const int i_warp = threadIdx.x / 32 % 4, row0 = 16 * i_warp, g = lane_id() / 4, t = lane_id() % 4;
    const auto& f = s.factors[i_stage].at;
    const auto &s_q = s.q[i_stage], &s_k = s.k[i_stage];
    BwdSums<C>& sums = s.sums[i_stage];
    float of_scores[2] = {}, of_beta[2] = {}, columns[C / 8][2];
    RegTile<16, C> r_score, r_qk;  // [16, C]
    hold(r_score);
    hold(r_qk);
    wgmma_fence();
    start_product<Major::K, Major::MN, V>(r_score, s.d_o[i_stage], s.written, false);
    start_product<Major::K, Major::K, K>(r_qk, s_q, s_k, false);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    hold(r_score);
    hold(r_qk);
    // Calls use(row, whether above or below the diagonal, decay, score, product, i, j, e).
    const auto for_pairs = [&](auto use) {
        const int first = fresh(row0 + g), col0 = fresh(2 * t), distance = first - col0;
        #pragma unroll
        for (int j = 0; j < C / 8; ++j) {
            const float2 from = reinterpret_cast<const float2&>(f[G2][8 * j + col0]);
            const float2 norm = reinterpret_cast<const float2&>(f[K_NORM][8 * j + col0]);
            #pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = first + 8 * i;
                const float g2 = f[G2][row];
                #pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float decay = exp2_approx(g2 - (e == 0 ? from.x : from.y)) * (e == 0 ? norm.x : norm.y);
                    const int diagonal = 8 * (j - i) + e;
                    const bool above = distance < diagonal, below = distance > diagonal;
                    use(row, above, below, decay, r_score.at[0][j][2 * i + e], r_qk.at[0][j][2 * i + e], i, j, e);
                }
            }
        }
    };
    for_pairs([&](int row, bool above, bool below, float decay, float& score, float qk, int i, int j, int e) {
        score = above ? 0.0f : score * decay * (f[Q_NORM][row] * p.scale);
        // The diagonal is in both sums of (7), and would leave its rounding behind where all else has decayed.
        const float product = below ? score * qk : 0.0f;
        of_scores[i] += product;
        columns[j][e] = i == 0 ? product : columns[j][e] + product;
    });
    OperandA<typename Cfg::Half, 1, 16, C> r_d_score;
    narrow(r_d_score, r_score);
    hold(r_score);
    hold(r_qk);
    wgmma_fence();
    start_product<Major::MN, Major::MN, V>(r_score, s.dx, s.written, false);
    start_product<Major::K, Major::K, K>(r_qk, s_k, s_k, false);
    wgmma_commit_group();
    put_columns<false>(sums.columns[i_warp], columns);
    wgmma_wait_group<0>();
    hold(r_score);
    hold(r_qk);
    for_pairs([&](int row, bool above, bool below, float decay, float& key, float kk, int i, int j, int e) {
        if (!above && !below) sums.rows[OF_WRITTEN][row] = key;
        const float dm = below ? -key * decay * f[K_NORM][row] : 0.0f;
        key = f[BETA][row] * dm;
        const float of_beta_here = dm * kk;
        of_beta[i] += of_beta_here;
        of_scores[i] = fmaf(f[BETA][row], of_beta_here, of_scores[i]);
        columns[j][e] = fmaf(f[BETA][row], of_beta_here, i == 0 ? 0.0f : columns[j][e]);
    });
    auto& s_d = d_matrices(s);
    bar_sync(BAR_WRITTEN, CONSUMERS);  // V' has been read
    store_operand_at(s_d[0], r_d_score, row0);
    store_result_at(s_d[1], r_score, row0);
    fence_proxy_async();
    bar_sync(BAR_CONSUMERS, CONSUMERS);  // dP and D are there
    // Only now, when registers have room for it.
    RegTile<16, K> r_dq;  // [16, K]
    hold(r_dq);
    wgmma_fence();
    start_product<Major::K, Major::MN, V>(r_dq, s.d_o[i_stage], s.state, false);
    wgmma_commit_group();
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
        of_scores[i] = group_sum<4>(of_scores[i]);
        of_beta[i] = group_sum<4>(of_beta[i]);
    }
    put_rows(sums.rows[OF_SCORES], of_scores, row0);
    put_rows(sums.rows[OF_BETA], of_beta, row0);
    put_columns<true>(sums.columns[i_warp], columns);
    wgmma_wait_group<0>();
    hold(r_dq);
    mbarrier_arrive(s.free_states);
    scale_rows(r_dq, f[TO_OUTPUT], row0);
    float of_states[2];
    row_dots_at(of_states, r_dq, s_q, row0, 0);
    put_rows(sums.rows[OF_STATES], of_states, row0);
    hold(r_dq);
    wgmma_fence();
    start_product<Major::K, Major::MN, C>(r_dq, s_d[0], s_k, true);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    hold(r_dq);
    if constexpr (Cfg::NORMALISE_QK) take_off_length(r_dq, s_q, f[Q_NORM], row0);
    // By way of the place of dO, which nobody reads any more.
    store_whole(p.dq, Cfg::GROUPED ? p.hv : p.h, as_rows<C, K>(s.d_o[i_stage]), r_dq, s.walk, i_step, BAR_QUERIES);
}

// (5) and its parts of (7) and (8), by the other.
template <ChunkBwdConfig Cfg>
__device__ void keys(
    ChunkBwdShared<Cfg>& s, const ChunkBwdParams<typename Cfg::Element, typename Cfg::Work>& p, int of_step, int i_step
) {
    // Once more, so that descriptors are made here and not kept.
    const int i_stage = __shfl_sync(FULL_WARP, fresh(of_step), 0);
    constexpr int C = Cfg::C, K = Cfg::K, V = BWD_V;
    const int row0 = 16 * (threadIdx.x / 32 % 4);
    const auto& f = s.factors[i_stage].at;
    const auto &s_q = s.q[i_stage], &s_k = s.k[i_stage];
    BwdSums<C>& sums = s.sums[i_stage];
    RegTile<16, K> r_dk;     // [16, K]
    RegTile<16, 64> r_read;  // [16, 64] of [16, K]: registers have no room for more
    hold(r_dk);
    hold(r_read);
    wgmma_fence();
    start_product<Major::MN, Major::MN, V>(r_dk, s.written, s.d_state, false);
    wgmma_commit_group();
    start_product<Major::MN, Major::MN, V>(r_read, s.dx, s.state, false);
    wgmma_commit_group();
    wgmma_wait_group<1>();
    hold(r_dk);
    bar_arrive(BAR_WRITTEN, CONSUMERS);
    scale_rows(r_dk, f[TO_STATE], row0);
    float of_added[2], of_read[2] = {};
    row_dots_at(of_added, r_dk, s_k, row0, 0);
    put_rows(sums.rows[OF_ADDED], of_added, row0);
    #pragma unroll
    for (int col = 0; col < K; col += 64) {
        wgmma_wait_group<0>();
        hold(r_read);
        float sum[2];
        row_dots_at(sum, r_read, s_k, row0, col);
        of_read[0] += sum[0];
        of_read[1] += sum[1];
        scale_rows(r_read, f[FROM_STATE], row0);
        #pragma unroll
        for (int j = 0; j < 8; ++j) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) r_dk.at[0][col / 8 + j][e] -= r_read.at[0][j][e];
        }
        if (col + 64 < K) {
            hold(r_read);
            wgmma_fence();
            start_product<Major::MN, Major::MN, V>(r_read, s.dx, s.state, false, col + 64);
            wgmma_commit_group();
        }
    }
    mbarrier_arrive(s.free_states);
    put_rows(sums.rows[OF_READ], of_read, row0);
    bar_sync(BAR_CONSUMERS, CONSUMERS);  // dP and D are there
    hold(r_dk);
    wgmma_fence();
    const auto& s_d = d_matrices(s);
    start_product<Major::MN, Major::MN, C>(r_dk, s_d[0], s_q, true);
    start_product<Major::K, Major::MN, C>(r_dk, s_d[1], s_k, true);
    start_product<Major::MN, Major::MN, C>(r_dk, s_d[1], s_k, true);
    wgmma_commit_group();
    wgmma_wait_group<0>();
    hold(r_dk);
    if constexpr (Cfg::NORMALISE_QK) take_off_length(r_dk, s_k, f[K_NORM], row0);
    // By way of the place of dX, of which dV has been made.
    mbarrier_wait_parity(s.stored, i_step & 1);
    store_whole(p.dk, Cfg::GROUPED ? p.hv : p.h, as_rows<C, K>(s.dx), r_dk, s.walk, i_step, BAR_KEYS);
}

// (1) to (7), by two warpgroups.
template <ChunkBwdConfig Cfg>
__device__ void consume(ChunkBwdShared<Cfg>& s, const ChunkBwdParams<typename Cfg::Element, typename Cfg::Work>& p) {
    using Half = typename Cfg::Half;
    constexpr int C = Cfg::C, K = Cfg::K, V = BWD_V;
    const ChunkBwdWalk& walk = s.walk;
    // Not kept from the start to the end, like everything that takes registers and is soon made again.
    const auto state_at = [&](auto* states) {
        const Segment& segment = reinterpret_cast<const Segment*>(p.segments)[fresh(blockIdx.x) / u32(p.hv)];
        return states + (segment.i_n * p.hv + walk.i_hv) * (i64(K) * V);
    };
    RegTile<16, K> r_state;  // [16, K] of dS^T
    const int i_v_start = (threadIdx.x - WARPGROUP) / 32 * 16;
    if (p.d_ends != nullptr) {
        load_state_rows(r_state, p.d_ends + (i64(blockIdx.x) * V + i_v_start) * K, V);
    } else {
        load_state<Cfg>(r_state, p.d_final_state == nullptr ? nullptr : state_at(p.d_final_state), i_v_start, 0);
    }
    for (int i_step = 0; i_step < walk.chunks; ++i_step) {
        // Both are said to be the same in all lanes, so that descriptors and branches are.
        const int i_stage = __shfl_sync(FULL_WARP, i_step % BWD_STAGES, 0);
        const u32 round = i_step / BWD_STAGES;
        const int i_warp = __shfl_sync(FULL_WARP, (fresh(threadIdx.x) - WARPGROUP) / 32, 0), i_v = 16 * i_warp;
        const Chunk chunk = walk.chunk_at<C>(i_step);
        const auto& f = s.factors[i_stage].at;
        const auto &s_q = s.q[i_stage], &s_k = s.k[i_stage];
        mbarrier_wait_parity(s.loaded[i_stage], round & 1);
        if (chunk.rows < C) {
            clear_rows(s.k[i_stage], int(chunk.rows));
            clear_rows(s.q[i_stage], int(chunk.rows));
            clear_rows(s.d_o[i_stage], int(chunk.rows));
            fence_proxy_async();
            bar_sync(BAR_CONSUMERS, CONSUMERS);  // the chunk is there
        }
        {
            // (1)
            OperandA<Half, 1, 16, K> r_s;
            narrow(r_s, r_state);
            RegTile<16, C> r_v;  // [16, C] of dV'^T
            hold(r_s);
            hold(r_v);
            wgmma_fence();
            start_times_transposed(r_v, r_s, s_k, false);
            wgmma_commit_group();
            store_operand_at(s.d_state, r_s, i_v);
            mbarrier_wait_parity(s.loaded_states, i_step & 1);
            const float dot = dot_states(r_s, s.state, i_v);
            if (lane_id() == 0) s.sums[i_stage].dots[i_warp] = dot;
            OperandA<Half, 1, 16, C> r_do, r_a;
            load_a_transposed(r_do, s.d_o[i_stage], 0, fresh(i_v));
            mbarrier_wait_parity(s.loaded_matrices, i_step & 1);
            wgmma_wait_group<0>();
            hold(r_s);
            hold(r_v);
            scale_columns(r_v, f[TO_STATE]);
            hold(r_do);
            hold(r_v);
            wgmma_fence();
            start_times(r_v, r_do, s.scores, true);
            wgmma_commit_group();
            wgmma_wait_group<0>();
            hold(r_do);
            hold(r_v);
            // With what rounding takes off dV': where keys repeat, dX is a difference of its rows.
            OperandA<Half, 1, 16, C> r_rest;
            narrow(r_a, r_v);
            narrow_rest(r_rest, r_v, r_a);
            RegTile<16, C> r_x;  // [16, C] of dX^T
            hold(r_a);
            hold(r_rest);
            hold(r_x);
            wgmma_fence();
            start_times(r_x, r_a, s.inverse, false);
            start_times(r_x, r_rest, s.inverse, true);
            wgmma_commit_group();
            scale_operand(r_do, f[TO_OUTPUT]);
            wgmma_wait_group<0>();
            hold(r_a);
            hold(r_rest);
            hold(r_x);
            mbarrier_arrive(s.free_matrices);
            narrow(r_a, r_x);
            bar_sync(BAR_CONSUMERS, CONSUMERS);  // dK of the last chunk has left the place of dX
            store_operand_at(s.dx, r_a, i_v);
            // (2)
            const float decay = exp2_approx(f[G2][C - 1]);
            for_each(r_state, [=](int, int, float& x) { x *= decay; });
            #pragma unroll
            for (int j = 0; j < C / 8; ++j) {
                const float2 from_state = reinterpret_cast<const float2&>(f[FROM_STATE][8 * j + lane_id() % 4 * 2]);
                #pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const float* x = &r_x.at[0][j][2 * e];
                    r_a.part[0].at[0][j / 2][j % 2 * 2 + e] = pack2<Half>(-from_state.x * x[0], -from_state.y * x[1]);
                }
            }
            hold(r_a);
            hold(r_do);
            hold(r_state);
            wgmma_fence();
            start_times(r_state, r_do, s_q, true);
            start_times(r_state, r_a, s_k, true);
            wgmma_commit_group();
            const i64 token = (chunk.first * p.hv + walk.i_hv) * V + i_v;
            if constexpr (Cfg::HEAD_BETA) {
                bool rare = false;
                #pragma unroll
                for (int i = 0; i < C / 32; ++i) {
                    const int row = 32 * i + lane_id();
                    rare |= row < chunk.rows && fabsf(f[BETA][row]) <= LEAST_BETA;
                }
                if (__any_sync(FULL_WARP, rare)) {
                    put_values<Cfg>(s.sums[i_stage], r_x, p.v + token, i64(p.hv) * V, int(chunk.rows), i_warp);
                }
            }
            wgmma_wait_group<0>();
            hold(r_a);
            hold(r_do);
            hold(r_state);
        }
        mbarrier_wait_parity(s.loaded_written, i_step & 1);
        fence_proxy_async();
        bar_sync(BAR_CONSUMERS, CONSUMERS);  // dS and dX are there
        mbarrier_arrive(s.solved);
        if (i_warp < 4) {
            queries<Cfg>(s, p, i_stage, i_step);
        } else {
            keys<Cfg>(s, p, i_stage, i_step);
        }
        mbarrier_arrive(s.summed[i_stage]);
        mbarrier_arrive(s.free[i_stage]);
        mbarrier_arrive(s.free_written);
    }
    if (p.d_initial_state != nullptr) {
        const Segment& segment = reinterpret_cast<const Segment*>(p.segments)[fresh(blockIdx.x) / u32(p.hv)];
        if (segment.before == 0) store_state<Cfg>(state_at(p.d_initial_state), r_state, (fresh(threadIdx.x) - WARPGROUP) / 32 * 16, 0);
    }
}

template <ChunkBwdConfig Cfg>
__device__ void chunk_bwd(const ChunkBwdParams<typename Cfg::Element, typename Cfg::Work>& p) {
    static_assert(Cfg::V == BWD_V && Cfg::K == PADDED_K<Cfg> && Cfg::PARTS == 1 && Cfg::C == 64, "two halves of 64 columns");
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkBwdShared<Cfg>*>(s_bytes);
    if (threadIdx.x == 0) {
        s.walk = ChunkBwdWalk::of_block<Cfg>(p);
        #pragma unroll
        for (int i = 0; i < BWD_STAGES; ++i) {
            mbarrier_init(s.loaded[i], 1);
            mbarrier_init(s.free[i], CONSUMERS + 96);
            mbarrier_init(s.summed[i], CONSUMERS);
        }
        mbarrier_init(s.loaded_matrices, 1);
        mbarrier_init(s.loaded_states, 1);
        mbarrier_init(s.loaded_written, 1);
        mbarrier_init(s.free_matrices, CONSUMERS);
        mbarrier_init(s.free_states, CONSUMERS);
        mbarrier_init(s.free_written, CONSUMERS);
        mbarrier_init(s.solved, CONSUMERS);
        mbarrier_init(s.stored, 64);
        fence_mbarrier_init();
    }
    __syncthreads();  // the barriers and the walk are there
    if (threadIdx.x < WARPGROUP) {
        setmaxnreg_dec<40>();
        if (threadIdx.x == 0) copy_chunks<Cfg>(s, p);
        if (threadIdx.x / 32 == 1) store_gates<Cfg>(s, p);
        if (threadIdx.x / 32 >= 2) store_values<Cfg>(s, p);
    } else {
        setmaxnreg_inc<232>();
        consume<Cfg>(s, p);
    }
}

}  // namespace fla::gated_delta
