// chunk_fwd_state: the state from chunk to chunk, and the outputs.
//
//   U  = K S                                                                      (1)
//   V' = T (beta V - from_state U)                                                (2)  what the chunk's rows write
//   O  = to_output (Q S) + P V'                                                   (3)
//   S <- e^{G_C} S + K^T (to_state V')                                            (4)
//
// T, P and the factors of rows come from `chunk_fwd_intra`. Of a sequence that is cut into segments a launch before makes
// their maps, N by the same walk from a state of zero, M by one with beta V = 0 from the unit matrix; each segment then
// starts from what the maps before it make of the initial state.
//
// Reference  fla_reference::gated_delta::recurrent_fwd
// Launch     grid NS * HV * ceil(V / BV), block 32 * WARPS_V * WARPS_K: a block walks a segment with BV columns of a state
// FLA        chunk_gated_delta_rule_fwd_h, chunk_fwd_o
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
struct ChunkFwdStateParams {
    const Element* q;            // [B, T, H, K]
    const Element* k;            // [B, T, H, K]
    const Element* v;            // [B, T, HV, V]
    const Work* inverse;         // [NT, HV, C, C]  T
    const Work* scores;          // [NT, HV, C, C]  P
    const float* factors;        // [NT, HV, 8, C]
    const i64* segments;         // [NS, 6]
    const float* initial_state;  // [N, HV, K, V]   or [N, HV, V, K]; null: zero
    Element* o;                  // [B, T, HV, V]
    float* final_state;          // the same        null: not wanted
    Work* states;                // [NT, HV, V, K]  padded to multiples of 32 and 64; the state before each chunk
    Work* written;               // [NT, HV, V, C]  padded; V'
    float* maps;                 // [NS, HV, V + K, K]  padded; null where no sequence is cut
    i32* kept;                   // [NS, HV]        whether M is there
    i32 h;
    i32 hv;
};

template <class Cfg>
concept ChunkFwdStateConfig = ChunkTiles<Cfg> && requires {
    Cfg::WARPS_V;      // warps side by side over V, each with 16 columns of the state
    Cfg::WARPS_K;      // warps that share them, each with a part of K
    Cfg::STAGES;       // chunks that are in shared memory or on their way there
    Cfg::OUTPUT;       // outputs are wanted
    Cfg::KEEP;         // states and V' are wanted
    Cfg::MAPS;         // maps of segments are wanted, and nothing else
    Cfg::SPLIT;        // sequences are cut into segments
    Cfg::VALUE_MAJOR;  // states at the border are [V, K]
};

template <ChunkFwdStateConfig Cfg>
struct ChunkFwdStateStage {
    template <int COLS>
    using Tile = OperandTile<typename Cfg::Half, Cfg::PARTS, Cfg::C, COLS>;
    Tile<PADDED_K<Cfg>> k;                      // [C, K]
    Tile<16 * Cfg::WARPS_V> v;                  // [C, BV]
    Tile<Cfg::C> inverse;                       // [C, C]
    Factors<Cfg::C> factors;
    Maybe<Tile<PADDED_K<Cfg>>, Cfg::OUTPUT> q;  // [C, K]
    Maybe<Tile<Cfg::C>, Cfg::OUTPUT> scores;    // [C, C]
};

template <ChunkFwdStateConfig Cfg>
struct ChunkFwdStateShared {
    union {
        ChunkFwdStateStage<Cfg> stages[Cfg::STAGES];
        // The start of a segment is found before its first chunk is loaded.
        Maybe<MapTiles<16 * Cfg::WARPS_V, PADDED_K<Cfg>>, Cfg::SPLIT> map;
    };
    int count;  // of chunks to be walked
    Maybe<Exchange<Cfg::WARPS_V * Cfg::WARPS_K, Cfg::C>, (Cfg::WARPS_K > 1)> exchange;
};

// Where a block works.
struct ChunkFwdStateSlice {
    Segment segment;
    i64 i_hv, i_h;
    int i_v;  // the first of its columns; from PADDED_V on they are those of the unit matrix
};

template <ChunkFwdStateConfig Cfg>
__device__ void load_stage(
    ChunkFwdStateStage<Cfg>& s,
    const ChunkFwdStateParams<typename Cfg::Element, typename Cfg::Work>& p,
    const ChunkFwdStateSlice& slice,
    int i_c
) {
    constexpr int C = Cfg::C, K = Cfg::K, V = Cfg::V, THREADS = 32 * Cfg::WARPS_V * Cfg::WARPS_K;
    const i64 first = slice.segment.bos + i64(i_c) * C;
    const int rows = int(min(i64(C), slice.segment.eos - first));
    const i64 qk = (first * p.h + slice.i_h) * K, qk_stride = i64(p.h) * K;
    const i64 tile = (slice.segment.chunk + i_c) * p.hv + slice.i_hv;
    const int i_thread = threadIdx.x;
    load_rows<THREADS, VECTORS_K<Cfg>>(s.k, p.k + qk, qk_stride, rows, K, i_thread);
    const int cols = max(V - slice.i_v, 0);
    const i64 token = (first * p.hv + slice.i_hv) * V + (cols > 0 ? slice.i_v : 0);
    load_rows<THREADS, VECTORS_V<Cfg>>(s.v, p.v + token, i64(p.hv) * V, rows, cols, i_thread);
    load_rows<THREADS, true>(s.inverse, p.inverse + tile * (C * C), C, C, C, i_thread);
    if constexpr (Cfg::OUTPUT) {
        load_rows<THREADS, VECTORS_K<Cfg>>(s.q.it, p.q + qk, qk_stride, rows, K, i_thread);
        load_rows<THREADS, true>(s.scores.it, p.scores + tile * (C * C), C, C, C, i_thread);
    }
    load_factors<THREADS>(s.factors, p.factors + tile * (FACTORS * C), i_thread);
}

template <ChunkFwdStateConfig Cfg>
__device__ void chunk_fwd_state(const ChunkFwdStateParams<typename Cfg::Element, typename Cfg::Work>& p) {
    using Half = typename Cfg::Half;
    constexpr int C = Cfg::C, K = Cfg::K, V = Cfg::V, PARTS = Cfg::PARTS, STAGES = Cfg::STAGES;
    constexpr int WK = Cfg::WARPS_K, WARPS = Cfg::WARPS_V * WK, KW = PADDED_K<Cfg> / WK, BV = 16 * Cfg::WARPS_V;
    constexpr u32 SLICES_V = ceil_div(V, BV), SLICES = SLICES_V + (Cfg::MAPS ? ceil_div(PADDED_K<Cfg>, BV) : 0);
    static_assert(WK == 1 || !(Cfg::MAPS || Cfg::SPLIT), "a warp has whole rows of a map");
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkFwdStateShared<Cfg>*>(s_bytes);

    // Slices of one head are neighbours, so that they find its keys and queries in L2.
    const u32 i_head = blockIdx.x / SLICES, i_slice = blockIdx.x % SLICES, i_segment = i_head / u32(p.hv);
    const bool of_unit = Cfg::MAPS && i_slice >= SLICES_V;
    ChunkFwdStateSlice slice;
    slice.segment = reinterpret_cast<const Segment*>(p.segments)[i_segment];
    slice.i_hv = i_head % u32(p.hv);
    slice.i_h = u32(slice.i_hv) / (u32(p.hv) / u32(p.h));
    slice.i_v = of_unit ? PADDED_V<Cfg> + (i_slice - SLICES_V) * BV : i_slice * BV;
    const Segment& segment = slice.segment;
    const int i_warp = threadIdx.x / 32, i_wk = i_warp % WK, v_in_block = i_warp / WK * 16;
    const int i_v = slice.i_v + v_in_block, i_k = i_wk * KW;  // of this warp
    const i64 state = (segment.i_n * p.hv + slice.i_hv) * (i64(K) * V);
    const int chunks = int(chunks_of<C>(segment));  // the host keeps them below 2^31

    RegTile<16, KW> r_state;  // [16, KW] of S^T
    int start = 0;  // the first chunk that is walked
    if constexpr (Cfg::MAPS) {
        if (segment.after == 0) return;
        const i64 tile = segment.chunk * p.hv + slice.i_hv;
        const float* growth = p.factors + (tile * FACTORS + GROWTH) * C;
        const int count = chunks_to_walk<C>(s.count, growth, i64(p.hv) * (FACTORS * C), chunks, false);
        const bool keeps = count > chunks;
        if (threadIdx.x == 0 && i_slice == 0) p.kept[i64(i_segment) * p.hv + slice.i_hv] = keeps;
        if (of_unit && !keeps) return;
        start = keeps ? 0 : chunks - count;
        for_each(r_state, [=](int row, int col, float& x) { x = i_v + row == PADDED_V<Cfg> + col ? 1.0f : 0.0f; });
        if (!of_unit) zero(r_state);
        if (!of_unit && segment.before == 0 && start == 0 && p.initial_state != nullptr) {
            load_state<Cfg>(r_state, p.initial_state + state, i_v, i_k);
        }
    } else {
        load_state<Cfg>(r_state, p.initial_state == nullptr ? nullptr : p.initial_state + state, i_v, i_k);
        if constexpr (Cfg::SPLIT) {
            // The segments before this one from the last that keeps nothing on, or from the first.
            constexpr i64 MAP = i64(MAP_ROWS<Cfg>) * PADDED_K<Cfg>;
            const i64 here = i64(i_segment) * p.hv + slice.i_hv;
            i64 back = min(segment.before, i64(1));
            while (back < segment.before && p.kept[here - back * p.hv] != 0) ++back;
            // The map of the first segment holds what it makes of the initial state.
            if (segment.before > 0) zero(r_state);
            for (; back > 0; --back) {
                const float* map = p.maps + (here - back * p.hv) * MAP;
                if (p.kept[here - back * p.hv] != 0 && back < segment.before) {
                    times_map<32 * WARPS, false>(r_state, s.map.it, map + PADDED_V<Cfg> * PADDED_K<Cfg>);
                } else {
                    zero(r_state);
                }
                if (i_v < PADDED_V<Cfg>) add_rows(r_state, map, i_v);
            }
        }
    }
    #pragma unroll
    for (int i = 0; i < STAGES - 1; ++i) {
        if (start + i < chunks) load_stage<Cfg>(s.stages[i], p, slice, start + i);
        cp_async_commit_group();
    }
    for (int i_c = start, i_stage = 0; i_c < chunks; ++i_c, i_stage = i_stage + 1 == STAGES ? 0 : i_stage + 1) {
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
        const ChunkFwdStateStage<Cfg>& stage = s.stages[i_stage];
        const i64 first = segment.bos + i64(i_c) * C, tile = (segment.chunk + i_c) * p.hv + slice.i_hv;
        const int rows = int(min(i64(C), segment.eos - first));

        if constexpr (Cfg::KEEP) {
            const i64 at = (tile * PADDED_V<Cfg> + i_v) * PADDED_K<Cfg> + i_k;
            store_result<true>(p.states + at, PADDED_K<Cfg>, r_state, PADDED_V<Cfg> - i_v, KW);
        }
        // (1), and the first term of (3)
        RegTile<16, C> r_u, r_o;  // [16, C] of U^T, and of O^T
        zero(r_u);
        zero(r_o);
        if constexpr (Cfg::OUTPUT) {
            mma_rounded_transposed(r_u, r_o, r_state, stage.k, stage.q.it, i_k);
            sum_over_k<WK>(r_o, s.exchange);
        } else {
            mma_rounded_transposed(r_u, r_state, stage.k, 0, i_k);
        }
        sum_over_k<WK>(r_u, s.exchange);
        if constexpr (STAGES > 1) {
            // Here, where products are under way that this does not wait for.
            const int next = i_c + STAGES - 1;
            if (next < chunks) load_stage<Cfg>(s.stages[i_stage == 0 ? STAGES - 1 : i_stage - 1], p, slice, next);
            cp_async_commit_group();
        }
        // (2)
        RegTile<16, C> r_v;  // [16, C] of V^T, then of V'^T
        OperandA<Half, PARTS, 16, C> r_a;
        load_a_transposed(r_a, stage.v, 0, v_in_block);
        widen(r_v, r_a);
        scale_columns(r_v, stage.factors.at[BETA]);
        scale_columns(r_u, stage.factors.at[FROM_STATE]);
        subtract(r_v, r_u);
        narrow(r_a, r_v);
        zero(r_v);
        mma_shared_transposed<Blocks::UPPER>(r_v, r_a, stage.inverse, 0, 0);
        if constexpr (Cfg::OUTPUT) {
            // (3)
            scale_columns(r_o, stage.factors.at[TO_OUTPUT]);
            narrow(r_a, r_v);
            mma_shared_transposed<Blocks::UPPER>(r_o, r_a, stage.scores.it, 0, 0);
            if (i_wk == 0) {
                store_result_transposed<V % 4 == 0>(
                    p.o + (first * p.hv + slice.i_hv) * V + i_v, i64(p.hv) * V, r_o, V - i_v, rows
                );
            }
        } else if (Cfg::KEEP && i_wk == 0) {
            const i64 at = (tile * PADDED_V<Cfg> + i_v) * C;
            store_result<true>(p.written + at, C, r_v, PADDED_V<Cfg> - i_v, C);
        }
        // (4)
        scale_columns(r_v, stage.factors.at[TO_STATE]);
        narrow(r_a, r_v);
        const float decay = exp2_approx(stage.factors.at[G2][C - 1]);
        for_each(r_state, [=](int, int, float& x) { x *= decay; });
        mma_shared(r_state, r_a, stage.k, 0, i_k);
    }
    cp_async_wait_group<0>();
    if constexpr (Cfg::MAPS) {
        const i64 map = (i64(i_segment) * p.hv + slice.i_hv) * MAP_ROWS<Cfg> + i_v;
        const int rows = (of_unit ? MAP_ROWS<Cfg> : PADDED_V<Cfg>) - i_v;
        store_result<true>(p.maps + map * PADDED_K<Cfg>, PADDED_K<Cfg>, r_state, rows, PADDED_K<Cfg>);
    } else if (p.final_state != nullptr && segment.after == 0) {
        store_state<Cfg>(p.final_state + state, r_state, i_v, i_k);
    }
}

}  // namespace fla::gated_delta
