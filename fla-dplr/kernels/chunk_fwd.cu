// chunk_fwd: the DPLR delta rule in chunks of 16 tokens, on tensor cores.
//
// With the operands of a chunk as `chunk_prep.cuh` makes them, and the state S at the chunk's start, [V, K]:
//
//   u  = T (aa S^T + A_ak v)              (4)
//   o  = qq S^T + A_qk v + A_qb u         (5)
//   S <- e^{G_15} (S + v^T kk + u^T bb)    (6)
//
// A state's rows, one for each value channel, never meet: a warp has some of them in registers from the first chunk to the
// last, as the accumulators of (6), which are the left operands of (4) and (5) as they lie.
//
// Reference  fla_reference::dplr::chunk_fwd
// Launch     a block has BV value channels of one sequence and head: a warp for every STATE_ROWS of them, and those that
//            prepare chunks
// FLA        chunk_dplr_delta_rule
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/blocks.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>
#include <fla/dplr/chunk_prep.cuh>
#include <fla/dplr/chunk_state.cuh>

namespace fla::dplr {

template <class Element>
struct ChunkFwdParams {
    const Element* q;            // [B, T, H, K]
    const Element* k;            // [B, T, H, K]
    const Element* v;            // [B, T, H, V]
    const Element* a;            // [B, T, H, K]  reads the state; or a key
    const Element* b;            // [B, T, H, K]  writes what a has read; or the rate of the key
    const Element* g;            // [B, T, H, K]  log decay, natural base, at most 0; or RWKV-7's raw w
    const float* initial_state;  // [N, H, K, V]  null: zero
    const i64* cu_seqlens;       // [N + 1]       null: N dense sequences of t tokens
    const i64* chunk_offsets;    // [N + 1]       chunks before each sequence; null: dense
    Element* o;                  // [B, T, H, V]  unused without OUTPUT
    float* final_state;          // [N, H, K, V]  null: not wanted
    u16* states;                 // [NT, heads, V * (K + C) * PARTS]  `SavedChunk`s, with KEEP_STATES
    i64 n;
    i64 t;
    i32 h;
    i32 first_h;  // the launch takes heads first_h .. first_h + heads of every sequence
    i32 heads;
    float scale;
};

template <class Cfg>
concept ChunkFwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;             // key channels
    Cfg::V;             // value channels
    Cfg::BV;            // value channels of a block
    Cfg::STAGES;        // chunks in shared memory
    Cfg::STATE_ROWS;    // value channels of a warp, a multiple of 16
    Cfg::PREP_GROUPS;   // groups of warps that prepare chunks by turns
    Cfg::SCALE_WARPS;   // warps of a group that make operands: 3 or 4
    Cfg::LOAD_WARP;     // whether loading has a warp of its own
    Cfg::OUTPUT;        // o is wanted
    Cfg::KEEP_STATES;   // states are wanted
    Cfg::UNIT;          // in place of values and a state there is the unit matrix: V = K, and the final state is a map of states
    Cfg::KEY_AND_RATE;  // a is a key and b its rate: the transition is diag(e^g) - (a b) a^T
    Cfg::RAW_DECAY;     // g is RWKV-7's raw w, and the log decay -e^{-1/2} sigmoid(w)
};

template <class Cfg>
struct ChunkFwdShared {
    ChunkStage<Cfg> stages[Cfg::STAGES];
    ChunkPrep<Cfg> prep;
    ChunkWork<Cfg> work;  // here, as it would take registers from every kind of warp
};

template <ChunkFwdConfig Cfg>
__device__ void chunk_fwd(const ChunkFwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    constexpr int K = Cfg::K, V = Cfg::V, BV = Cfg::BV, STAGES = Cfg::STAGES, P = PARTS<Cfg>;
    constexpr int CONSUMERS = BV / Cfg::STATE_ROWS, M = Cfg::STATE_ROWS / 16, HEAD = PREP_WARPS<Cfg>;
    constexpr bool HOLDS = P * KP<Cfg> <= 64, IS_TIGHT = P * KP<Cfg> > 256;
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkFwdShared<Cfg>*>(s_bytes);
    const ChunkWork<Cfg>& work = s.work;
    if (threadIdx.x == 0) s.work = ChunkWork<Cfg>(p, blockIdx.x);
    __syncthreads();  // work is there
    init_prep(s.prep, p, (work.bos * p.h + work.i_h) * Cfg::K);
    __syncthreads();  // prep is ready
    const int i_warp = threadIdx.x / 32;
    const i32 stride_k = p.h * K, stride_v = p.h * V;  // 16 rows of them are less than 2^31 elements

    if (i_warp < HEAD) {
        const i64 at_v = (work.bos * p.h + work.i_h) * V + work.v0;
        const auto load = [&](ChunkStage<Cfg>& stage, int i_chunk, int rows) {
            load_k_tokens(stage, s.prep, i_chunk * (C * i64(stride_k)), stride_k, rows);
            if constexpr (!Cfg::UNIT) {
                load_tokens<V, 32>(
                    stage.v, p.v + at_v + i_chunk * (C * i64(stride_v)), stride_v, rows, V - work.v0, lane_id()
                );
            }
        };
        prepare_chunks<Cfg, false, CONSUMERS, CONSUMERS>(s.stages, s.prep, work.chunks, p.scale, load);
        return;
    }

    // In the tiles, and of the head.
    const int col_v = Cfg::STATE_ROWS * (i_warp - HEAD), v0 = (V > BV ? work.v0 : 0) + col_v;
    const auto at_state = [&] { return (work.i_n * p.h + work.i_h) * K * V; };
    StateRows<Cfg> r_state;
    zero<Cfg>(r_state);
    if constexpr (Cfg::UNIT) {
        for_state<Cfg>(r_state, v0, [](i64 i, float& x) { x = i % (V + 1) == 0 ? 1.0f : 0.0f; });
    } else if (p.initial_state != nullptr) {
        for_state<Cfg>(r_state, v0, [&](i64 i, float& x) { x = p.initial_state[at_state() + i]; });
    }
    auto* saved = reinterpret_cast<SavedChunk<Cfg>*>(p.states) + work.i_saved;
    for (int i = 0; i < work.chunks.count; ++i) {
        const ChunkStage<Cfg>& stage = s.stages[i % STAGES];
        bar_sync(FULL<Cfg> + i % TURNS<Cfg>, 32 * (GROUP_WARPS<Cfg> + CONSUMERS));
        const FragB<P> ak = load_b_transposed(stage.ak, 0, 0);
        FragB<P> t;
        if constexpr (!IS_TIGHT) t = load_b_transposed(stage.t, 0, 0);
        // (4) to (6), transposed: channels are rows and tokens are columns. The state as it is read stays as long as there are
        // registers for it, so that outputs are work for the time that a product of the chain takes.
        Acc16 u[M], o[M];
        FragA<P> v[M], state[M][HOLDS ? KP<Cfg> / 16 : 1];
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            zero(u[m]);
            zero(o[m]);
            if constexpr (!Cfg::UNIT) {
                v[m] = load_a_transposed<P>(stage.v, col_v + 16 * m);
                mma(u[m], v[m], ak);
            }
        }
        #pragma unroll
        for (int j = 0; j < KP<Cfg> / 16; ++j) {
            const FragB<P> aa = load_b_transposed(stage.aa, 0, 16 * j);
            FragB<P> qq;
            if constexpr (Cfg::OUTPUT && !HOLDS) qq = load_b_transposed(stage.qq, 0, 16 * j);
            #pragma unroll
            for (int m = 0; m < M; ++m) {
                FragA<P>& read = state[m][HOLDS ? j : 0];
                read = to_a<P>(r_state[m][j]);
                mma(u[m], read, aa);
                if constexpr (Cfg::OUTPUT && !HOLDS) mma(o[m], read, qq);
                if constexpr (Cfg::KEEP_STATES) {
                    if (V % BV == 0 || v0 + 16 * m < V) store_a(saved->state, v0 + 16 * m, 16 * j, read);
                }
            }
        }
        if (stage.is_exact()) scale_state<Cfg>(r_state, stage.between);
        if constexpr (!Cfg::UNIT) {
            #pragma unroll
            for (int j = 0; j < KP<Cfg> / 16; ++j) {
                const FragB<P> kk = load_b(stage.kk, 0, 16 * j);
                #pragma unroll
                for (int m = 0; m < M; ++m) mma(r_state[m][j], v[m], kk);
            }
        }
        if constexpr (IS_TIGHT) t = load_b_transposed(stage.t, 0, 0);
        FragA<P> r_u[M];
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            const FragA<P> rhs = to_a<P>(u[m]);
            zero(u[m]);
            mma(u[m], rhs, t);
        }
        if constexpr (Cfg::OUTPUT) {
            const FragB<P> qk = load_b_transposed(stage.qk, 0, 0);
            #pragma unroll
            for (int m = 0; m < M; ++m) mma(o[m], v[m], qk);
            if constexpr (HOLDS) {
                #pragma unroll
                for (int j = 0; j < KP<Cfg> / 16; ++j) {
                    const FragB<P> qq = load_b_transposed(stage.qq, 0, 16 * j);
                    #pragma unroll
                    for (int m = 0; m < M; ++m) mma(o[m], state[m][j], qq);
                }
            }
        }
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            r_u[m] = to_a<P>(u[m]);
            if constexpr (Cfg::KEEP_STATES) {
                if (V % BV == 0 || v0 + 16 * m < V) store_a(saved->u, v0 + 16 * m, 0, r_u[m]);
            }
        }
        #pragma unroll
        for (int j = 0; j < KP<Cfg> / 16; ++j) {
            const FragB<P> bb = load_b(stage.bb, 0, 16 * j);
            #pragma unroll
            for (int m = 0; m < M; ++m) mma(r_state[m][j], r_u[m], bb);
        }
        if constexpr (Cfg::OUTPUT) {
            const FragB<P> qb = load_b_transposed(stage.qb, 0, 0);
            #pragma unroll
            for (int m = 0; m < M; ++m) mma(o[m], r_u[m], qb);
        }
        scale_state<Cfg>(r_state, stage.decay);
        if (i + TURNS<Cfg> < work.chunks.count) bar_arrive(EMPTY<Cfg> + i % TURNS<Cfg>, 32 * (1 + CONSUMERS));

        if constexpr (Cfg::OUTPUT) {
            Element* dst = p.o + ((work.bos + i64(i) * C) * p.h + work.i_h) * V;
            #pragma unroll
            for (int m = 0; m < M; ++m) store_rows<V>(dst, stride_v, o[m], v0 + 16 * m, work.chunks.rows(i));
        }
        if constexpr (Cfg::KEEP_STATES) saved += p.heads;
    }
    if (p.final_state != nullptr) {
        for_state<Cfg>(r_state, v0, [&](i64 i, float& x) { p.final_state[at_state() + i] = x; });
    }
}

}  // namespace fla::dplr
