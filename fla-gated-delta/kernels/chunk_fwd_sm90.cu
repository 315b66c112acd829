// chunk_fwd_sm90: the forward pass in one kernel: while some warpgroups take the state through a chunk, another prepares the next.
//
//   T  = Gamma (I + stril(beta_i k_i . k_j))^{-1}     P_ij = scale Gamma_ij q_i . k_j for i >= j        (1)
//   U  = K S                                                                      (2)
//   V' = T (beta V - from_state U)                                                (3)  what the chunk's rows write
//   O  = to_output (Q S) + P V'                                                   (4)
//   S <- e^{G_C} S + K^T (to_state V')                                            (5)
//
// It does what `chunk_fwd_intra` and `chunk_fwd_state` do, and T and P stay in shared memory. States are held transposed: a
// warpgroup has 64 columns of one as the rows of its results. Sequences are not cut here: a segment is a whole one. Where two
// warpgroups prepare, they take chunks in turn.
//
// Reference  fla_reference::gated_delta::recurrent_fwd
// Launch     grid NS * HV * ceil(V / BV), block 128 * (PREPARERS + BV / 64): a block walks a segment with BV columns of a state
// FLA        chunk_gated_delta_rule
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/tma.cuh>
#include <fla/core/tri_inverse.cuh>
#include <fla/core/warp.cuh>
#include <fla/core/wgmma.cuh>
#include <fla/gated_delta/chunk.cuh>
#include <fla/gated_delta/chunk_rows.cuh>
#include <fla/gated_delta/chunk_wgmma.cuh>

namespace fla::gated_delta {

template <class Element, class Work>
struct ChunkFwdParams {
    TensorMap q;                 // [B T, H K]       boxes of [C, 64], as k and v
    TensorMap k;                 // [B T, H K]
    TensorMap v;                 // [B T, HV V]
    const float* g;              // [B, T, HV]       log decay, natural base, at most 0
    const Element* g_logit;      // [B, T, HV]       in its place: g = -e^a_log softplus(g_logit + dt_bias)
    const float* a_log;          // [HV]
    const float* dt_bias;        // [HV]             null: zero
    const Element* beta;         // [B, T, HV]
    const i64* segments;         // [NS, 6]
    const float* initial_state;  // [N, HV, K, V]    or [N, HV, V, K]; null: zero
    Element* o;                  // [B, T, HV, V]
    float* final_state;          // the same         null: not wanted
    Work* states;                // [NT, HV, V, K]   padded to multiples of 32 and 64; the state before each chunk
    Work* written;               // [NT, HV, V, C]   padded; V'
    Work* inverse;               // [NT, HV, C, C]   T; null, as the two that follow: not wanted
    Work* scores;                // [NT, HV, C, C]   P
    float* factors;              // [NT, HV, 8, C]
    i32 h;
    i32 hv;
    float scale;
};

template <class Cfg>
concept ChunkFwdConfig = ChunkTiles<Cfg> && requires {
    Cfg::LOG_GATE;      // g is a log decay
    Cfg::RAW_GATE;      // g is made of logits, a_log and dt_bias
    Cfg::HEAD_BETA;     // a strength for each head
    Cfg::SIGMOID_BETA;  // strengths are logits
    Cfg::TWICE_BETA;    // strengths are doubled after that
    Cfg::NORMALISE_QK;  // q and k are divided by their lengths
    Cfg::BV;            // columns of the state that a block has
    Cfg::STAGES;        // chunks that are in shared memory or on their way there
    Cfg::OUTPUT;        // outputs are wanted
    Cfg::KEEP;          // states, V', T, P and factors are wanted
    Cfg::VALUE_MAJOR;   // states at the border are [V, K]
    Cfg::PREPARERS;     // warpgroups that prepare chunks
};

template <ChunkFwdConfig Cfg>
struct ChunkFwdStage {
    template <int COLS>
    using Tile = OperandTile<typename Cfg::Half, 1, Cfg::C, COLS>;
    Tile<PADDED_K<Cfg>> k, q;       // [C, K]
    Tile<Cfg::BV> v;                // [C, BV]
    Tile<Cfg::C> inverse, scores;   // [C, C]  T and P
    Factors<Cfg::C> factors;
};

template <ChunkFwdConfig Cfg>
struct ChunkFwdShared {
    ChunkFwdStage<Cfg> stages[Cfg::STAGES];
    SharedTile<float, Cfg::C, Cfg::C> inverse[Cfg::PREPARERS];  // [C, C]
    float lengths[Cfg::PREPARERS][2][Cfg::C];                   // squared, of keys and queries
    Ring<Cfg::STAGES> ring;
};

// Where a block works.
struct ChunkFwdSlice {
    i64 bos, eos;  // tokens of the segment
    i64 chunk;     // its first
    int chunks;
    int i_hv, i_h;
    int i_v;       // the first of its columns
    u32 i_segment;

    // Slices of one head are neighbours, so that they find its keys and queries in L2.
    template <class Cfg, class Params>
    __device__ static ChunkFwdSlice of_block(const Params& p) {
        constexpr u32 SLICES = ceil_div(Cfg::V, Cfg::BV);
        const u32 i_head = blockIdx.x / SLICES;
        ChunkFwdSlice r;
        r.i_segment = i_head / u32(p.hv);
        const Segment& segment = reinterpret_cast<const Segment*>(p.segments)[r.i_segment];
        r.bos = segment.bos;
        r.eos = segment.eos;
        r.chunk = segment.chunk;
        r.chunks = int(chunks_of<Cfg::C>(segment));  // the host keeps them below 2^31
        r.i_hv = i_head % u32(p.hv);
        r.i_h = u32(r.i_hv) / (u32(p.hv) / u32(p.h));
        r.i_v = blockIdx.x % SLICES * Cfg::BV;
        return r;
    }
};

inline constexpr int WARPGROUP = 128;
// Named barriers: 0 is the block's, and each warpgroup that prepares has two of these.
inline constexpr int BAR_PREPARE = 1, BAR_INVERSE = 2, BAR_CLEARED = 5;

// Starts to copy a chunk. One thread calls it.
template <ChunkFwdConfig Cfg>
__device__ void load_stage(
    ChunkFwdShared<Cfg>& s,
    const ChunkFwdParams<typename Cfg::Element, typename Cfg::Work>& p,
    const ChunkFwdSlice& slice,
    int i_stage,
    i64 first
) {
    constexpr int C = Cfg::C, K = Cfg::K, BV = Cfg::BV;
    static_assert(K == PADDED_K<Cfg> && Cfg::V % 64 == 0, "whole boxes");
    ChunkFwdStage<Cfg>& stage = s.stages[i_stage];
    Barrier& bar = s.ring.loaded[i_stage];
    // Columns past the end come as zeros, and so does every box with its full number of bytes.
    mbarrier_arrive_expect_tx(bar, (2 * K + BV) * C * sizeof(typename Cfg::Element));
    #pragma unroll
    for (int col = 0; col < K; col += 64) {
        cp_async_bulk_tensor_2d_shared_global(&stage.k.part[0].at(0, col), p.k, slice.i_h * K + col, i32(first), bar);
        cp_async_bulk_tensor_2d_shared_global(&stage.q.part[0].at(0, col), p.q, slice.i_h * K + col, i32(first), bar);
    }
    #pragma unroll
    for (int col = 0; col < BV; col += 64) {
        const int x = slice.i_hv * Cfg::V + slice.i_v + col;
        cp_async_bulk_tensor_2d_shared_global(&stage.v.part[0].at(0, col), p.v, x, i32(first), bar);
    }
}

// s[rows ..] = 0, by a warpgroup: rows past the end of a sequence are those of the next.
template <class Half, int ROWS, int COLS>
__device__ void clear_rows(OperandTile<Half, 1, ROWS, COLS>& s, int rows) {
    constexpr int PIECES = COLS / 8;
    for (int i = rows * PIECES + threadIdx.x % WARPGROUP; i < ROWS * PIECES; i += WARPGROUP) {
        reinterpret_cast<Words<4>&>(s.part[0].at(i / PIECES, i % PIECES * 8)) = {};
    }
}

// (1) for one chunk after the other, by one warpgroup; or for every second one by each of two.
template <ChunkFwdConfig Cfg>
__device__ void prepare(
    ChunkFwdShared<Cfg>& s, const ChunkFwdParams<typename Cfg::Element, typename Cfg::Work>& p
) {
    using Half = typename Cfg::Half;
    using Work = typename Cfg::Work;
    constexpr int C = Cfg::C, STAGES = Cfg::STAGES, INNER = PADDED_K<Cfg>, LOADS = 3, PREPARERS = Cfg::PREPARERS;
    static_assert(C == 64, "a warpgroup has 64 rows");
    static_assert(PREPARERS == 1 || (PREPARERS == 2 && STAGES == 3), "two at work, and a third with the scan");
    // Said to be the same in all lanes, so that descriptors are.
    const int i_group = PREPARERS == 1 ? 0 : __shfl_sync(FULL_WARP, threadIdx.x / WARPGROUP, 0);
    auto& s_inverse = s.inverse[i_group];
    auto& s_lengths = s.lengths[i_group];
    const auto slice = ChunkFwdSlice::of_block<Cfg>(p);
    const bool keeps = Cfg::KEEP && slice.i_v == 0 && p.inverse != nullptr;  // all slices have the same
    const int i_warp = threadIdx.x / 32 % 4, row0 = 16 * i_warp, i_thread = threadIdx.x % WARPGROUP;
    const auto meet = [=] { bar_sync(BAR_PREPARE + 2 * i_group, WARPGROUP); };
    const auto chunk_at = [&](int i_c) {
        const i64 first = slice.bos + i64(i_c) * C;
        return Chunk{first, min(i64(C), slice.eos - first)};
    };
    // What warp LOADS does for a chunk: it has time while others invert.
    const auto ask = [&](int i_c, int i_stage) {
        const Chunk chunk = chunk_at(i_c);
        if (lane_id() == 0) load_stage<Cfg>(s, p, slice, i_stage, chunk.first);
        if constexpr (!Cfg::NORMALISE_QK) {
            const auto numbers = load_numbers<Cfg>(p, chunk, slice.i_hv);
            row_factors<Cfg, false>(s.stages[i_stage].factors, s_lengths, numbers, p.scale);
        }
    };
    // Blocks above the diagonal stay as they are.
    const int i_preparing = PREPARERS == 1 ? i_thread : int(threadIdx.x);
    for (int i = i_preparing * 8; i < STAGES * C * C; i += PREPARERS * WARPGROUP * 8) {
        ChunkFwdStage<Cfg>& stage = s.stages[i / (C * C)];
        reinterpret_cast<Words<4>&>(stage.inverse.part[0].elems[i % (C * C)]) = {};
        reinterpret_cast<Words<4>&>(stage.scores.part[0].elems[i % (C * C)]) = {};
    }
    if constexpr (PREPARERS > 1) {
        fence_proxy_async();
        bar_sync(BAR_CLEARED, PREPARERS * WARPGROUP);  // zeros are there, whoever writes beside them
    }
    const auto next = [](RingPlace<STAGES>& place) {
        #pragma unroll
        for (int i = 0; i < PREPARERS; ++i) place.next();
    };
    RingPlace<STAGES> at, ahead;
    at.stage = i_group;
    if (i_warp == LOADS && slice.chunks > i_group) ask(i_group, i_group);
    for (int i_c = i_group; i_c < slice.chunks; i_c += PREPARERS, next(at)) {
        ChunkFwdStage<Cfg>& stage = s.stages[at.stage];
        const auto& f = stage.factors.at;
        const Chunk chunk = chunk_at(i_c);
        const i64 tile = (slice.chunk + i_c) * p.hv + slice.i_hv;
        mbarrier_wait_parity(s.ring.loaded[at.stage], at.round & 1);
        if (chunk.rows < C) {
            clear_rows(stage.k, int(chunk.rows));
            clear_rows(stage.q, int(chunk.rows));
            clear_rows(stage.v, int(chunk.rows));
            fence_proxy_async();
        }
        meet();  // the chunk and its factors are there, and the last inverse has been read
        RegTile<16, C> r_kk, r_qk;  // [16, C]
        hold(r_kk);
        hold(r_qk);
        wgmma_fence();
        start_product<Major::K, Major::K, INNER>(r_kk, stage.k, stage.k, false);
        wgmma_commit_group();
        start_product<Major::K, Major::K, INNER>(r_qk, stage.q, stage.k, false);
        wgmma_commit_group();
        if constexpr (Cfg::NORMALISE_QK) {
            row_lengths<WARPGROUP, PREPARERS == 1>(s_lengths[0], stage.k);
            row_lengths<WARPGROUP, PREPARERS == 1>(s_lengths[1], stage.q);
            meet();  // lengths are there
            if (i_warp == LOADS) {
                const auto numbers = load_numbers<Cfg>(p, chunk, slice.i_hv);
                row_factors<Cfg, false>(stage.factors, s_lengths, numbers, p.scale);
            }
            meet();  // factors are there
        }
        wgmma_wait_group<1>();
        hold(r_kk);
        for_lower(r_kk, i_warp, [&](int row, int col, float& x) {
            const float norms = Cfg::NORMALISE_QK ? f[K_NORM][row] * f[K_NORM][col] : 1.0f;
            x = row > col ? x * f[BETA][row] * norms : 0.0f;
        });
        #pragma unroll
        for (int j = 0; j < C / 8; ++j) {
            if (j / 2 > i_warp) break;
            const int row = row0 + lane_id() / 4, col = 8 * j + lane_id() % 4 * 2;
            reinterpret_cast<float2&>(s_inverse.at(row, col)) = {r_kk.at[0][j][0], r_kk.at[0][j][1]};
            reinterpret_cast<float2&>(s_inverse.at(row + 8, col)) = {r_kk.at[0][j][2], r_kk.at[0][j][3]};
        }
        wgmma_wait_group<0>();
        hold(r_qk);
        const auto put_scores = [&] {
            for_lower(r_qk, i_warp, [&](int row, int col, float& x) {
                const float decay = exp2_approx(f[G2][row] - f[G2][col]);
                const float norms = Cfg::NORMALISE_QK ? f[Q_NORM][row] * f[K_NORM][col] : 1.0f;
                x = row >= col ? x * decay * (p.scale * norms) : 0.0f;
            });
            #pragma unroll
            for (int j = 0; j < C / 8; ++j) {
                if (j / 2 > i_warp) break;
                const int row = row0 + lane_id() / 4, col = 8 * j + lane_id() % 4 * 2;
                const float(&x)[4] = r_qk.at[0][j];
                reinterpret_cast<u32&>(stage.scores.part[0].at(row, col)) = pack2<Half>(x[0], x[1]);
                reinterpret_cast<u32&>(stage.scores.part[0].at(row + 8, col)) = pack2<Half>(x[2], x[3]);
            }
        };
        // The warps that invert have few of them; the others put theirs meanwhile.
        static_assert(TRI_INVERSE_WARPS<C> == 2 && LOADS > 1, "the upper half inverts");
        if (i_warp < 2) put_scores();
        meet();  // I + L is there
        if (i_warp < 2) {
            tri_inverse<Merge::TF32>(s_inverse, i_warp, BAR_INVERSE + 2 * i_group);
        } else {
            put_scores();
            ahead = at;
            next(ahead);
            if (i_warp == LOADS && i_c + PREPARERS < slice.chunks) {
                if (ahead.round > 0) mbarrier_wait_parity(s.ring.free[ahead.stage], (ahead.round - 1) & 1);
                ask(i_c + PREPARERS, ahead.stage);
            }
        }
        meet();  // the inverse is there
        // 16 elements of a block row for each four lanes, of the ten blocks that are not above the diagonal.
        #pragma unroll
        for (int first = 0; first < 10 * 64; first += WARPGROUP) {
            const int i = first + i_thread, i_block = i / 64;
            const int block_row = i_block < 1 ? 0 : i_block < 3 ? 1 : i_block < 6 ? 2 : 3;
            const int row = 16 * block_row + i % 64 / 4;
            const int col = 16 * (i_block - block_row * (block_row + 1) / 2) + i % 4 * 4;
            const float4 x = reinterpret_cast<const float4&>(s_inverse.at(row, col));
            const float4 g2 = reinterpret_cast<const float4&>(f[G2][col]);
            const float in[4] = {x.x, x.y, x.z, x.w}, from[4] = {g2.x, g2.y, g2.z, g2.w};
            Vec<Half, 4> out;
            #pragma unroll
            for (int e = 0; e < 4; ++e) {
                out.at[e] = from_f32<Half>(row >= col + e ? in[e] * exp2_approx(f[G2][row] - from[e]) : 0.0f);
            }
            reinterpret_cast<Vec<Half, 4>&>(stage.inverse.part[0].at(row, col)) = out;
        }
        fence_proxy_async();
        if (keeps) meet();  // T and P are there
        // The scan may be done with the stage before they are stored, and then the next to prepare writes them again: that is
        // this warpgroup, or the other, which waits until they have been read.
        if constexpr (PREPARERS == 1) mbarrier_arrive(s.ring.ready[at.stage]);
        if (keeps) {
            static_assert(same<Half, Work>, "what is kept is what is multiplied with");
            store_rows<WARPGROUP>(p.inverse + tile * (C * C), C, stage.inverse.part[0], C, i_thread);
            store_rows<WARPGROUP>(p.scores + tile * (C * C), C, stage.scores.part[0], C, i_thread);
            for (int j = i_thread; j < FACTORS * C; j += WARPGROUP) {
                p.factors[tile * (FACTORS * C) + j] = (&f[0][0])[j];
            }
        }
        if constexpr (PREPARERS > 1) mbarrier_arrive(s.ring.ready[at.stage]);
    }
}

// v = beta v - from_state u, all transposed. A pair at a time: registers do not hold both as f32.
template <class Half, int C>
__device__ void subtract_read(
    OperandA<Half, 1, 16, C>& v, const RegTile<16, C>& u, const float (&s_beta)[C], const float (&s_from_state)[C]
) {
    const int t = lane_id() % 4;
    #pragma unroll
    for (int j = 0; j < C / 8; ++j) {
        const float2 beta = reinterpret_cast<const float2&>(s_beta[8 * j + 2 * t]);
        const float2 from_state = reinterpret_cast<const float2&>(s_from_state[8 * j + 2 * t]);
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
            u32& pair = v.part[0].at[0][j / 2][j % 2 * 2 + e];
            const float2 x = unpack2<Half>(pair);
            const float(&y)[4] = u.at[0][j];
            pair = pack2<Half>(beta.x * x.x - from_state.x * y[2 * e], beta.y * x.y - from_state.y * y[2 * e + 1]);
        }
    }
}

// (2) to (5), by the warpgroups that hold the state.
template <ChunkFwdConfig Cfg>
__device__ void scan(
    ChunkFwdShared<Cfg>& s,
    const ChunkFwdParams<typename Cfg::Element, typename Cfg::Work>& p
) {
    using Half = typename Cfg::Half;
    constexpr int C = Cfg::C, K = Cfg::K, V = Cfg::V, STAGES = Cfg::STAGES, KP = PADDED_K<Cfg>;
    const auto slice = ChunkFwdSlice::of_block<Cfg>(p);
    const int v_in_block = (threadIdx.x - Cfg::PREPARERS * WARPGROUP) / 32 * 16, i_v = slice.i_v + v_in_block;  // of this warp
    RegTile<16, KP> r_state;  // [16, K] of S^T
    const Segment& segment = reinterpret_cast<const Segment*>(p.segments)[slice.i_segment];
    const i64 state = (segment.i_n * p.hv + slice.i_hv) * (i64(K) * V);
    load_state<Cfg>(r_state, p.initial_state == nullptr ? nullptr : p.initial_state + state, i_v, 0);
    RingPlace<STAGES> at;
    for (int i_c = 0; i_c < slice.chunks; ++i_c, at.next()) {
        const ChunkFwdStage<Cfg>& stage = s.stages[at.stage];
        const auto& f = stage.factors.at;
        const i64 first = slice.bos + i64(i_c) * C, tile = (slice.chunk + i_c) * p.hv + slice.i_hv;
        OperandA<Half, 1, 16, KP> r_s;
        narrow(r_s, r_state);
        mbarrier_wait_parity(s.ring.loaded[at.stage], at.round & 1);
        mbarrier_wait_parity(s.ring.ready[at.stage], at.round & 1);
        // (2), and the first term of (4): the rounded state is not needed after these.
        RegTile<16, C> r_u, r_o;  // [16, C] of U^T, and of O^T
        hold(r_s);
        hold(r_u);
        if constexpr (Cfg::OUTPUT) hold(r_o);
        wgmma_fence();
        start_times_transposed(r_u, r_s, stage.k, false);
        if constexpr (Cfg::OUTPUT) start_times_transposed(r_o, r_s, stage.q, false);
        wgmma_commit_group();
        if constexpr (Cfg::KEEP) {
            const i64 row = tile * PADDED_V<Cfg> + i_v;
            store_result<true>(p.states + row * KP, KP, r_state, PADDED_V<Cfg> - i_v, KP);
        }
        const float decay = exp2_approx(f[G2][C - 1]);
        wgmma_wait_group<0>();
        hold(r_s);
        hold(r_u);
        if constexpr (Cfg::OUTPUT) hold(r_o);
        for_each(r_state, [=](int, int, float& x) { x *= decay; });
        // (3)
        OperandA<Half, 1, 16, C> r_a;  // V^T, then X^T, where X is what T is multiplied with
        load_a_transposed(r_a, stage.v, 0, v_in_block);
        subtract_read(r_a, r_u, f[BETA], f[FROM_STATE]);
        RegTile<16, C> r_v;  // [16, C] of V'^T
        hold(r_a);
        hold(r_v);
        wgmma_fence();
        start_times_transposed(r_v, r_a, stage.inverse, false);
        wgmma_commit_group();
        if constexpr (Cfg::OUTPUT) scale_columns(r_o, f[TO_OUTPUT]);
        wgmma_wait_group<0>();
        hold(r_a);
        hold(r_v);
        OperandA<Half, 1, 16, C> r_written;
        if constexpr (Cfg::OUTPUT) narrow(r_written, r_v);
        if constexpr (Cfg::KEEP) {
            store_result<true>(p.written + (tile * PADDED_V<Cfg> + i_v) * C, C, r_v, PADDED_V<Cfg> - i_v, C);
        }
        // (4) and (5)
        scale_columns(r_v, f[TO_STATE]);
        narrow(r_a, r_v);
        hold(r_a);
        hold(r_state);
        if constexpr (Cfg::OUTPUT) {
            hold(r_written);
            hold(r_o);
        }
        wgmma_fence();
        if constexpr (Cfg::OUTPUT) {
            start_times_transposed(r_o, r_written, stage.scores, true);
            wgmma_commit_group();
        }
        start_times(r_state, r_a, stage.k, true);
        wgmma_commit_group();
        if constexpr (Cfg::OUTPUT) {
            wgmma_wait_group<1>();
            hold(r_o);
            hold(r_written);
            const int rows = int(min(i64(C), slice.eos - first));
            if (i_v < V) store_columns(p.o + (first * p.hv + slice.i_hv) * V + i_v, i64(p.hv) * V, r_o, rows);
        }
        wgmma_wait_group<0>();
        hold(r_state);
        hold(r_a);
        mbarrier_arrive(s.ring.free[at.stage]);
    }
    if (p.final_state != nullptr && segment.after == 0) {
        store_state<Cfg>(p.final_state + state, r_state, i_v, 0);
    }
}

template <ChunkFwdConfig Cfg>
__device__ void chunk_fwd(const ChunkFwdParams<typename Cfg::Element, typename Cfg::Work>& p) {
    constexpr int BV = Cfg::BV, PREPARING = Cfg::PREPARERS * WARPGROUP;
    // Registers for all threads at the start, of which the scan takes some over.
    constexpr bool MANY_THREADS = PREPARING + 2 * BV > 256;
    static_assert(BV % 64 == 0 && Cfg::PARTS == 1, "64 columns for each warpgroup, single 16-bit numbers");
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkFwdShared<Cfg>*>(s_bytes);

    if (threadIdx.x == 0) init(s.ring, WARPGROUP, 2 * BV);
    __syncthreads();  // the ring is there
    if (threadIdx.x < PREPARING) {
        if constexpr (MANY_THREADS) setmaxnreg_dec<Cfg::PREPARERS == 1 ? 104 : 128>();
        prepare<Cfg>(s, p);
    } else {
        if constexpr (MANY_THREADS) setmaxnreg_inc<Cfg::PREPARERS == 1 ? 200 : 232>();
        scan<Cfg>(s, p);
    }
}

}  // namespace fla::gated_delta
