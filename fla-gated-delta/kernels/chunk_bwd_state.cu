// chunk_bwd_state: the gradient of the state from the last chunk to the first, and that of what the rows of a chunk write.
//
//   dV' = P^T dO + to_state (K dS)                                                (1)
//   dX  = T^T dV'                                                                 (2)  of X = beta V - from_state U
//   dS <- e^{G_C} dS + Q^T (to_output dO) - K^T (from_state dX)                   (3)
//
// T, P and the factors of rows come from `chunk_fwd_intra`. dV = beta dX. Of a sequence that is cut into segments a launch
// before makes N' of each, by the same walk from a gradient of zero; M is that of `chunk_fwd_state`.
//
// Reference  fla_reference::gated_delta::recurrent_bwd
// Launch     grid NS * HV * ceil(V / BV), block 32 * WARPS_V * WARPS_K: a block walks a segment with BV columns of a state
// FLA        chunk_gated_delta_rule_bwd_dhu
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/operand.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/warp.cuh>
#include <fla/gated_delta/chunk.cuh>

namespace fla::gated_delta {

template <class Element, class Work>
struct ChunkBwdStateParams {
    const Element* q;            // [B, T, H, K]
    const Element* k;            // [B, T, H, K]
    const Element* d_o;          // [B, T, HV, V]
    const Work* inverse;         // [NT, HV, C, C]  T
    const Work* scores;          // [NT, HV, C, C]  P
    const float* factors;        // [NT, HV, 8, C]
    const i64* segments;         // [NS, 6]
    const float* d_final_state;  // [N, HV, K, V]   or [N, HV, V, K]; null: zero
    float* d_initial_state;      // the same        null: not wanted
    Work* d_states;              // [NT, HV, V, K]  padded to multiples of 32 and 64; of the state after each chunk
    Work* dx;                    // [NT, HV, V, C]  padded
    const float* maps;           // [NS, HV, V + K, K]  padded; null where no sequence is cut
    const i32* kept;             // [NS, HV]        whether M is there
    float* d_maps;               // [NS, HV, V, K]  padded; N'^T
    float* ends;                 // [NS, HV, V, K]  padded; gradients of states after segments
    i32 h;
    i32 hv;
};

template <class Cfg>
concept ChunkBwdStateConfig = ChunkTiles<Cfg> && requires {
    Cfg::WARPS_V;      // warps side by side over V, each with 16 columns of the state
    Cfg::WARPS_K;      // warps that share them, each with a part of K
    Cfg::STAGES;       // chunks that are in shared memory or on their way there
    Cfg::MAPS;         // maps of segments are wanted, and nothing else
    Cfg::SPLIT;        // sequences are cut into segments
    Cfg::ENDS;         // gradients of states after segments are wanted, and nothing else
    Cfg::VALUE_MAJOR;  // states at the border are [V, K]
};

template <ChunkBwdStateConfig Cfg>
struct ChunkBwdStateStage {
    template <int COLS>
    using Tile = OperandTile<typename Cfg::Half, Cfg::PARTS, Cfg::C, COLS>;
    Tile<PADDED_K<Cfg>> k;      // [C, K]
    Tile<PADDED_K<Cfg>> q;      // [C, K]
    Tile<16 * Cfg::WARPS_V> d_o;  // [C, BV]
    Tile<Cfg::C> inverse;       // [C, C]
    Tile<Cfg::C> scores;        // [C, C]
    Factors<Cfg::C> factors;
};

template <ChunkBwdStateConfig Cfg>
struct ChunkBwdStateShared {
    union {
        ChunkBwdStateStage<Cfg> stages[Cfg::STAGES];
        // The end of a segment is found before its last chunk is loaded.
        Maybe<MapTiles<16 * Cfg::WARPS_V, PADDED_K<Cfg>>, Cfg::SPLIT> map;
    };
    int count;  // of chunks to be walked
    Maybe<Exchange<Cfg::WARPS_V * Cfg::WARPS_K, Cfg::C>, (Cfg::WARPS_K > 1)> exchange;
};

// Where a block works.
struct ChunkBwdStateSlice {
    Segment segment;
    i64 i_hv, i_h;
    int i_v;  // the first of its columns
};

template <ChunkBwdStateConfig Cfg>
__device__ void load_stage(
    ChunkBwdStateStage<Cfg>& s,
    const ChunkBwdStateParams<typename Cfg::Element, typename Cfg::Work>& p,
    const ChunkBwdStateSlice& slice,
    int i_c
) {
    constexpr int C = Cfg::C, K = Cfg::K, V = Cfg::V, THREADS = 32 * Cfg::WARPS_V * Cfg::WARPS_K;
    const i64 first = slice.segment.bos + i64(i_c) * C;
    const int rows = int(min(i64(C), slice.segment.eos - first));
    const i64 qk = (first * p.h + slice.i_h) * K, qk_stride = i64(p.h) * K;
    const i64 tile = (slice.segment.chunk + i_c) * p.hv + slice.i_hv;
    const int i_thread = threadIdx.x;
    load_rows<THREADS, VECTORS_K<Cfg>>(s.k, p.k + qk, qk_stride, rows, K, i_thread);
    load_rows<THREADS, VECTORS_K<Cfg>>(s.q, p.q + qk, qk_stride, rows, K, i_thread);
    load_rows<THREADS, VECTORS_V<Cfg>>(
        s.d_o, p.d_o + (first * p.hv + slice.i_hv) * V + slice.i_v, i64(p.hv) * V, rows, V - slice.i_v, i_thread
    );
    load_rows<THREADS, true>(s.inverse, p.inverse + tile * (C * C), C, C, C, i_thread);
    load_rows<THREADS, true>(s.scores, p.scores + tile * (C * C), C, C, C, i_thread);
    load_factors<THREADS>(s.factors, p.factors + tile * (FACTORS * C), i_thread);
}

template <ChunkBwdStateConfig Cfg>
__device__ void chunk_bwd_state(const ChunkBwdStateParams<typename Cfg::Element, typename Cfg::Work>& p) {
    using Half = typename Cfg::Half;
    constexpr int C = Cfg::C, K = Cfg::K, V = Cfg::V, PARTS = Cfg::PARTS, STAGES = Cfg::STAGES;
    constexpr int WK = Cfg::WARPS_K, WARPS = Cfg::WARPS_V * WK, KW = PADDED_K<Cfg> / WK, BV = 16 * Cfg::WARPS_V;
    constexpr u32 SLICES = ceil_div(V, BV);
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkBwdStateShared<Cfg>*>(s_bytes);

    const u32 i_head = blockIdx.x / SLICES, i_segment = i_head / u32(p.hv);
    ChunkBwdStateSlice slice;
    slice.segment = reinterpret_cast<const Segment*>(p.segments)[i_segment];
    slice.i_hv = i_head % u32(p.hv);
    slice.i_h = u32(slice.i_hv) / (u32(p.hv) / u32(p.h));
    slice.i_v = blockIdx.x % SLICES * BV;
    const Segment& segment = slice.segment;
    const int i_warp = threadIdx.x / 32, i_wk = i_warp % WK, v_in_block = i_warp / WK * 16;
    const int i_v = slice.i_v + v_in_block, i_k = i_wk * KW;  // of this warp
    const i64 state = (segment.i_n * p.hv + slice.i_hv) * (i64(K) * V);

    static_assert(WK == 1 || !(Cfg::MAPS || Cfg::SPLIT), "a warp has whole rows of a map");

    RegTile<16, KW> r_state;  // [16, KW] of dS^T
    int chunks = int(chunks_of<C>(segment));  // those that are walked; the host keeps them below 2^31
    const float* d_final_state = p.d_final_state == nullptr ? nullptr : p.d_final_state + state;
    if constexpr (Cfg::MAPS) {
        if (segment.before == 0) return;
        const i64 tile = segment.chunk * p.hv + slice.i_hv;
        const float* growth = p.factors + (tile * FACTORS + GROWTH) * C;
        const int count = chunks_to_walk<C>(s.count, growth, i64(p.hv) * (FACTORS * C), chunks, true);
        const bool walks_all = count > chunks;
        load_state<Cfg>(r_state, walks_all && segment.after == 0 ? d_final_state : nullptr, i_v, i_k);
        chunks = min(chunks, count);
    } else {
        load_state<Cfg>(r_state, d_final_state, i_v, i_k);
        if constexpr (Cfg::SPLIT) {
            // The segments after this one from the first that keeps nothing back, or from the last.
            constexpr i64 MAP = i64(MAP_ROWS<Cfg>) * PADDED_K<Cfg>, D_MAP = i64(PADDED_V<Cfg>) * PADDED_K<Cfg>;
            const i64 here = i64(i_segment) * p.hv + slice.i_hv;
            i64 ahead = min(segment.after, i64(1));
            while (ahead < segment.after && p.kept[here + ahead * p.hv] != 0) ++ahead;
            if (segment.after > 0) zero(r_state);
            for (; ahead > 0; --ahead) {
                const i64 there = here + ahead * p.hv;
                // The map of the last segment holds what it makes of the gradient of the final state.
                if (ahead < segment.after && p.kept[there] != 0) {
                    times_map<32 * WARPS, true>(
                        r_state, s.map.it, p.maps + there * MAP + PADDED_V<Cfg> * PADDED_K<Cfg>
                    );
                } else {
                    zero(r_state);
                }
                if (i_v < PADDED_V<Cfg>) add_rows(r_state, p.d_maps + there * D_MAP, i_v);
            }
        }
        if constexpr (Cfg::ENDS) {
            const i64 row = (i64(i_segment) * p.hv + slice.i_hv) * PADDED_V<Cfg> + i_v;
            store_result<true>(p.ends + row * PADDED_K<Cfg>, PADDED_K<Cfg>, r_state, PADDED_V<Cfg> - i_v, PADDED_K<Cfg>);
            return;
        }
    }
    #pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (i < chunks) load_stage<Cfg>(s.stages[i], p, slice, chunks - 1 - i);
        cp_async_commit_group();
    }
    for (int i_step = 0, i_stage = 0; i_step < chunks; ++i_step, i_stage = i_stage + 1 == STAGES ? 0 : i_stage + 1) {
        const int i_c = chunks - 1 - i_step;
        if constexpr (STAGES == 1) {
            __syncthreads();  // the last chunk has been read
            load_stage<Cfg>(s.stages[0], p, slice, i_c);
            cp_async_commit_group();
            cp_async_wait_group<0>();
            __syncthreads();  // the chunk is there
        } else {
            cp_async_wait_group<STAGES - 2>();
            __syncthreads();  // the chunk is there, and the last one has been read
        }
        const ChunkBwdStateStage<Cfg>& stage = s.stages[i_stage];
        const i64 tile = (segment.chunk + i_c) * p.hv + slice.i_hv;

        if constexpr (!Cfg::MAPS) {
            store_result<true>(
                p.d_states + (tile * PADDED_V<Cfg> + i_v) * PADDED_K<Cfg> + i_k, PADDED_K<Cfg>, r_state,
                PADDED_V<Cfg> - i_v, KW
            );
        }
        // (1)
        RegTile<16, C> r_v;  // [16, C] of dV'^T
        zero(r_v);
        mma_rounded_transposed(r_v, r_state, stage.k, 0, i_k);
        if constexpr (STAGES > 1) {
            // Here, where products are under way that this does not wait for.
            const int next = i_step + STAGES - 1, place = i_stage == 0 ? STAGES - 1 : i_stage - 1;
            if (next < chunks) load_stage<Cfg>(s.stages[place], p, slice, chunks - 1 - next);
            cp_async_commit_group();
        }
        OperandA<Half, PARTS, 16, C> r_a;
        // The part of (3) that waits for nothing; where registers are few it comes last.
        const auto add_queries = [&] {
            RegTile<16, C> r_do;  // [16, C] of dO^T
            load_a_transposed(r_a, stage.d_o, 0, v_in_block);
            widen(r_do, r_a);
            scale_columns(r_do, stage.factors.at[TO_OUTPUT]);
            narrow(r_a, r_do);
            mma_shared(r_state, r_a, stage.q, 0, i_k);
        };
        constexpr bool EARLY = PARTS == 1 && !Cfg::SPLIT;
        const float decay = exp2_approx(stage.factors.at[G2][C - 1]);
        if (EARLY) {
            for_each(r_state, [=](int, int, float& x) { x *= decay; });
            add_queries();
        }
        sum_over_k<WK>(r_v, s.exchange);
        scale_columns(r_v, stage.factors.at[TO_STATE]);
        load_a_transposed(r_a, stage.d_o, 0, v_in_block);
        mma_shared<Blocks::LOWER>(r_v, r_a, stage.scores, 0, 0);
        // (2), with what rounding takes off dV': where keys repeat, dX is a difference of its rows.
        RegTile<16, C> r_x;  // [16, C] of dX^T
        zero(r_x);
        narrow(r_a, r_v);
        mma_shared<Blocks::LOWER>(r_x, r_a, stage.inverse, 0, 0);
        if constexpr (PARTS == 1) {
            RegTile<16, C> r_rounded;
            widen(r_rounded, r_a);
            subtract(r_v, r_rounded);
            narrow(r_a, r_v);
            mma_shared<Blocks::LOWER>(r_x, r_a, stage.inverse, 0, 0);
        }
        if (!Cfg::MAPS && i_wk == 0) {
            store_result<true>(p.dx + (tile * PADDED_V<Cfg> + i_v) * C, C, r_x, PADDED_V<Cfg> - i_v, C);
        }
        // (3)
        scale_columns(r_x, stage.factors.at[FROM_STATE]);
        for_each(r_x, [](int, int, float& x) { x = -x; });
        narrow(r_a, r_x);
        if (!EARLY) for_each(r_state, [=](int, int, float& x) { x *= decay; });
        mma_shared(r_state, r_a, stage.k, 0, i_k);
        if (!EARLY) add_queries();
    }
    cp_async_wait_group<0>();
    if constexpr (Cfg::MAPS) {
        const i64 map = (i64(i_segment) * p.hv + slice.i_hv) * PADDED_V<Cfg> + i_v;
        store_result<true>(p.d_maps + map * PADDED_K<Cfg>, PADDED_K<Cfg>, r_state, PADDED_V<Cfg> - i_v, PADDED_K<Cfg>);
    } else if (p.d_initial_state != nullptr && segment.before == 0) {
        store_state<Cfg>(p.d_initial_state + state, r_state, i_v, i_k);
    }
}

}  // namespace fla::gated_delta
