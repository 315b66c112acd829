// chunk_fwd: RWKV-6 in chunks of 16 tokens, on tensor cores.
//
// With the factors of `chunk.cuh` and S the state before a chunk, [K, V]:
//
//   o  = scale (r reads) S + A v            (4)
//   S <- diag(end) S + (k writes)^T v       (5)
//
// Each warp has 16 value channels of the state in registers, transposed, as accumulators of (5), which are the left operands
// of (4) as they lie; and the same warps make the operands of the next chunk, 16 key channels each, which no state is needed
// for: so one block barrier for each chunk is enough, and several blocks share a multiprocessor and hide each other's waits.
//
// With few heads a sequence is cut into segments, and the kernel runs twice: with LOCAL for the state of a segment that starts
// from zero, and its decay; then each segment folds those before it into the state that it starts from.
//
// Reference  fla_reference::rwkv6::chunk_fwd
// Launch     a block has BV value channels of one segment and head: a warp for every 16 of them
// FLA        chunk_rwkv6
#pragma once
#include <fla/core/blocks.cuh>
#include <fla/core/chunk.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/decay.cuh>
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>
#include <fla/rwkv6/chunk.cuh>

namespace fla::rwkv6 {

template <class Element>
struct ChunkFwdParams {
    const Element* r;            // [B, T, H, K]  unused with LOCAL
    const Element* k;            // [B, T, H, K]
    const Element* v;            // [B, T, H, V]
    const Element* w;            // [B, T, H, K]  log decay, natural base, at most 0
    const Element* u;            // [H, K]        bonus
    const float* initial_state;  // [N, H, K, V]  null: zero
    const i64* cu_seqlens;       // [N + 1]       null: N dense sequences of t tokens
    const i64* chunk_offsets;    // [N + 1]       chunks before each sequence; null: dense
    Element* o;                  // [B, T, H, V]  unused without OUTPUT
    float* final_state;          // [N, H, K, V]  null: not wanted
    u16* states;                 // [NT, H, PARTS, K / 16, V / 16, 32, 8]  state before every chunk, with KEEP_STATES
    float* local_states;         // [N, H, max_segments, K / 16 V / 16 256]  of segments; written with LOCAL, else read
    float* local_decays;         // [N, H, max_segments, K]
    i64 t;
    i32 h;
    i32 segment_chunks;          // chunks of a segment
    i32 max_segments;            // of a sequence; 1: none is cut
    float scale;
};

template <class Cfg>
concept ChunkFwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;            // key channels
    Cfg::V;            // value channels
    Cfg::BV;           // value channels of a block
    Cfg::STAGES;       // chunks in shared memory
    Cfg::OUTPUT;       // o is wanted
    Cfg::KEEP_STATES;  // states are wanted
    Cfg::LOCAL;        // states of segments are wanted, and nothing else
};

template <class Cfg>
struct ChunkFwdStage {
    using Element = typename Cfg::Element;
    TokenTile<Element, KP<Cfg>> r, k, w;
    TokenTile<Element, Cfg::BV> v;
};

// What a chunk's tokens are to the state, and to each other.
template <class Cfg>
struct ChunkFwdOperands {
    BlockTile<PARTS<Cfg>, CHUNK, KP<Cfg>> reads, writes;  // scale r reads and k writes of (1)
    AccTile scores[KP<Cfg> / 16];                         // (3), what each slice of K adds
    alignas(16) float end[KP<Cfg>];                       // (2)
};

template <class Cfg>
struct ChunkFwdShared {
    ChunkFwdStage<Cfg> stages[Cfg::STAGES];
    ChunkFwdOperands<Cfg> operands[2];  // by turns
    DecaySums sums;
    alignas(16) float u[KP<Cfg>];
    alignas(16) float decay[KP<Cfg>];   // of the segment so far, with LOCAL
};

// Sums of log decays, [tokens, channels].
template <int P>
__device__ Acc16 sum_decays(const DecaySums& s, const FragB<P>& w, int sum) {
    Acc16 d;
    zero(d);
    mma(d, load_a(s.of[sum], 0, 0), w);
    return d;
}

// (1) to (3) for 16 channels.
template <class Cfg>
__device__ void prepare(
    ChunkFwdOperands<Cfg>& s_to, ChunkFwdShared<Cfg>& s, const ChunkFwdStage<Cfg>& stage, int col0, float scale
) {
    constexpr int P = PARTS<Cfg>;
    const int g = lane_id() / 4, t = lane_id() % 4;
    const FragB<DECAY_PARTS<Cfg>> w = load_decay<Cfg>(stage.w, col0);
    const Acc16 k = load_acc(stage.k, col0), writes = sum_decays(s.sums, w, WRITES);
    store_a(s_to.writes, 0, col0, to_a<P>(k * exp_approx(writes)));
    if (g == 0) {
        // This lane has the first token, after which `writes` are, at channels 8 n + 2 t and the next.
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int col = col0 + 8 * n + 2 * t;
            const float2 first = load_pair(stage.w, 0, col);
            const float2 end = {
                exp_approx(writes.at[n][0] + max(first.x, LEAST_DECAY)),
                exp_approx(writes.at[n][1] + max(first.y, LEAST_DECAY))};
            reinterpret_cast<float2&>(s_to.end[col]) = end;
            if constexpr (Cfg::LOCAL) {
                float2& decay = reinterpret_cast<float2&>(s.decay[col]);
                decay = {decay.x * end.x, decay.y * end.y};
            }
        }
    }
    if constexpr (Cfg::OUTPUT) {
        const Acc16 r = scale * load_acc(stage.r, col0), reads = sum_decays(s.sums, w, READS);
        store_a(s_to.reads, 0, col0, to_a<P>(r * exp_approx(reads)));

        // What the halves decay by: before the eighth token, and after the seventh.
        const float first = g == 0 ? min(min(reads.at[0][2], reads.at[0][3]), min(reads.at[1][2], reads.at[1][3])) : 0;
        const float last = g == 7 ? min(min(writes.at[0][0], writes.at[0][1]), min(writes.at[1][0], writes.at[1][1])) : 0;
        const bool is_wide = __any_sync(FULL_WARP, min(first, last) < -SPAN || has_step(w));
        Acc16 scores;
        zero(scores);
        for_pair_modes(is_wide, [&](int mode) {
            const Acc16 read = exp_approx(sum_decays(s.sums, w, pair_sum(mode)));
            const Acc16 write = mode == CENTRED ? exp_approx(sum_decays(s.sums, w, CENTRED_WRITES)) : read;
            Acc16 d;
            zero(d);
            mma(d, to_a<PAIR_PARTS>(r * read), to_b_transposed(to_a<PAIR_PARTS>(k * write)));
            for_each(d, [&](int row, int col, float& x) { x = is_pair(mode, row, col, false) ? x : 0.0f; });
            scores = scores + d;
        });
        // The diagonal: of rows g and g + 8.
        float bonus[2] = {};
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 u = *reinterpret_cast<const float2*>(&s.u[col0 + 8 * n + 2 * t]);
            #pragma unroll
            for (int e = 0; e < 4; ++e) bonus[e / 2] += r.at[n][e] * k.at[n][e] * (e % 2 == 0 ? u.x : u.y);
        }
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float sum = group_sum<4>(bonus[i]);
            #pragma unroll
            for (int e = 0; e < 2; ++e) scores.at[i][2 * i + e] += g == 2 * t + e ? sum : 0.0f;
        }
        s_to.scores[col0 / 16].put(scores);
    }
}

template <ChunkFwdConfig Cfg>
__device__ void chunk_fwd(const ChunkFwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    constexpr int K = Cfg::K, V = Cfg::V, STAGES = Cfg::STAGES, P = PARTS<Cfg>;
    constexpr int WARPS = Cfg::BV / 16, THREADS = 32 * WARPS, SLICES = KP<Cfg> / 16;
    static_assert(Cfg::OUTPUT + Cfg::LOCAL + Cfg::KEEP_STATES > 0 && !(Cfg::LOCAL && (Cfg::OUTPUT || Cfg::KEEP_STATES)));
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkFwdShared<Cfg>*>(s_bytes);
    const Work<Cfg> work(p);
    // The last segment's state is nobody's start.
    if (work.is_nothing() || (Cfg::LOCAL && work.is_last())) return;
    const int i_warp = threadIdx.x / 32, count = work.chunks.count;
    const i32 stride_k = p.h * K, stride_v = p.h * V;  // 16 rows of them are less than 2^31 elements
    const i64 at_k = (work.bos * p.h + work.i_h) * K, at_v = (work.bos * p.h + work.i_h) * V;

    const auto fetch = [&](int i) {
        if (i < count) {
            ChunkFwdStage<Cfg>& stage = s.stages[i % STAGES];
            const int rows = work.chunks.rows(i);
            const i64 k0 = at_k + i * (CHUNK * i64(stride_k)), v0 = at_v + i * (CHUNK * i64(stride_v)) + work.v0;
            if constexpr (Cfg::OUTPUT) load_tokens<K, THREADS>(stage.r, p.r + k0, stride_k, rows, K, threadIdx.x);
            load_tokens<K, THREADS>(stage.k, p.k + k0, stride_k, rows, K, threadIdx.x);
            load_tokens<K, THREADS>(stage.w, p.w + k0, stride_k, rows, K, threadIdx.x);
            load_tokens<V, THREADS>(stage.v, p.v + v0, stride_v, rows, V - work.v0, threadIdx.x);
        }
        cp_async_commit_group();
    };
    #pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) fetch(i);
    init(s.sums);
    for (int i = threadIdx.x; i < KP<Cfg>; i += THREADS) {
        s.u[i] = Cfg::OUTPUT && i < K ? to_f32(p.u[work.i_h * K + i]) : 0.0f;
        s.decay[i] = 1.0f;
    }

    // Rows of V of the state: tile j has key channels 16 j to 16 j + 16.
    const int col_v = 16 * i_warp, v0 = work.v0 + col_v;
    const i64 at_state = (work.i_n * p.h + work.i_h) * K * V;
    Acc16 state[SLICES];
    const auto for_state = [&](auto f) {
        #pragma unroll
        for (int j = 0; j < SLICES; ++j) {
            for_each(state[j], [&](int row, int col, float& x) {
                if (v0 + row < V && 16 * j + col < K) f(at_state + i64(16 * j + col) * V + v0 + row, x);
            });
        }
    };
    #pragma unroll
    for (int j = 0; j < SLICES; ++j) zero(state[j]);
    if (!Cfg::LOCAL && p.initial_state != nullptr) {
        for_state([&](i64 i, float& x) { x = p.initial_state[i]; });
    }
    const auto scale_state = [&](int j, const float* of) {
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 x = *reinterpret_cast<const float2*>(of + 16 * j + 8 * n + lane_id() % 4 * 2);
            #pragma unroll
            for (int e = 0; e < 4; ++e) state[j].at[n][e] *= e % 2 == 0 ? x.x : x.y;
        }
    };
    const auto local_tile = [&](int j) { return j * (VP<Cfg> / 16) + v0 / 16; };
    const bool has_rows = VP<Cfg> % Cfg::BV == 0 || v0 < VP<Cfg>;
    if (!Cfg::LOCAL) {
        for (int i = 0; i < work.i_segment; ++i) {
            const float* decay = p.local_decays + (work.i_local + i) * KP<Cfg>;
            const float* local = p.local_states + (work.i_local + i) * LOCAL_STATE<Cfg>;
            #pragma unroll
            for (int j = 0; j < SLICES; ++j) {
                scale_state(j, decay);
                if (has_rows) state[j] = state[j] + load_local(local, local_tile(j));
            }
        }
    }

    const auto prepare_chunk = [&](int i) {
        #pragma unroll 1
        for (int j = i_warp; j < SLICES; j += WARPS) {
            prepare<Cfg>(s.operands[i % 2], s, s.stages[i % STAGES], 16 * j, p.scale);
        }
    };
    if (count > 0) {
        cp_async_wait_group<STAGES - 2>();
        __syncthreads();  // the first chunk's tokens, sums and u are there
        prepare_chunk(0);
    }
    Element* o_chunk = p.o + at_v;
    u32* image = reinterpret_cast<u32*>(p.states) + (work.first_chunk * p.h + work.i_h) * IMAGE_WORDS<Cfg>;
    #pragma unroll 1
    for (int i = 0; i < count; ++i) {
        // Copies under way: of the chunks after the next.
        cp_async_wait_group<max(STAGES - 3, 0)>();
        __syncthreads();  // operands of this chunk and tokens of the next are there, and the last chunk's are free
        fetch(i + STAGES - 1);
        const ChunkFwdOperands<Cfg>& operands = s.operands[i % 2];
        const FragA<P> v = load_a_transposed<P>(s.stages[i % STAGES].v, col_v);
        // (4) and (5), transposed: channels are rows and tokens are columns
        Acc16 o;
        zero(o);
        #pragma unroll
        for (int j = 0; j < SLICES; ++j) {
            if constexpr (Cfg::OUTPUT || Cfg::KEEP_STATES) {
                const FragA<P> r_state = to_a<P>(state[j]);
                if constexpr (Cfg::OUTPUT) mma(o, r_state, load_b_transposed(operands.reads, 0, 16 * j));
                if constexpr (Cfg::KEEP_STATES) {
                    const FragA<P> turned = transposed(r_state);
                    #pragma unroll
                    for (int part = 0; part < P; ++part) {
                        Words<4> words;
                        #pragma unroll
                        for (int e = 0; e < 4; ++e) words.at[e] = turned.at[part][e];
                        if (has_rows) st_global(image + image_tile<Cfg>(part, 16 * j, v0), words);
                    }
                }
            }
            scale_state(j, operands.end);
            mma(state[j], v, load_b(operands.writes, 0, 16 * j));
        }
        if constexpr (Cfg::OUTPUT) {
            Acc16 scores = operands.scores[0].get();
            #pragma unroll
            for (int j = 1; j < SLICES; ++j) scores = scores + operands.scores[j].get();
            mma(o, v, to_b_transposed(to_a<PAIR_PARTS>(scores)));
            store_transposed<V>(o_chunk, stride_v, o, v0, work.chunks.rows(i));
            o_chunk += CHUNK * i64(stride_v);
        }
        if constexpr (Cfg::KEEP_STATES) image += p.h * IMAGE_WORDS<Cfg>;
        if (i + 1 < count) {
            if constexpr (STAGES == 2) {
                cp_async_wait_group<0>();
                __syncthreads();  // tokens of the next chunk are there
            }
            prepare_chunk(i + 1);
        }
    }

    if constexpr (Cfg::LOCAL) {
        float* local = p.local_states + (work.i_local + work.i_segment) * LOCAL_STATE<Cfg>;
        #pragma unroll
        for (int j = 0; j < SLICES; ++j) {
            if (has_rows) store_local(local, local_tile(j), state[j]);
        }
        // A channel's product is one lane's, of whichever warp: the last barrier was before the last chunk's.
        __syncthreads();
        float* decay = p.local_decays + (work.i_local + work.i_segment) * KP<Cfg>;
        if (work.v0 == 0) {
            for (int i = threadIdx.x; i < KP<Cfg>; i += THREADS) decay[i] = s.decay[i];
        }
    } else if (p.final_state != nullptr && work.is_last()) {
        for_state([&](i64 i, float& x) { p.final_state[i] = x; });
    }
}

}  // namespace fla::rwkv6
