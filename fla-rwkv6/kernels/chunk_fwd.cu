// chunk_fwd: RWKV-6 in chunks of 16 tokens, on tensor cores.
//
// With the factors of `chunk.cuh` and S the state before a chunk, [K, V]:
//
//   o  = scale (r reads) S + A v            (4)
//   S <- diag(end) S + (k writes)^T v       (5)
//
// Each warp has 16 value channels of the state in registers, transposed, as accumulators of (5), which are the left operands
// of (4) as they lie; and the same warps make the operands of later chunks, 16 key channels each, which no state is needed
// for. So one block barrier for each chunk is enough, and several blocks share a multiprocessor and hide each other's waits.
//
// With few heads a sequence is cut into segments, and the kernel runs twice: with LOCAL for the state of a segment that starts
// from zero, and its decay; then each segment folds those before it into the state that it starts from.
//
// A wide K is cut into slices, whose rows of the state do not meet: a block takes one as if it were all of K, and its part of (4),
// scores too, is one of those that `chunk_fwd_output` adds up.
//
// Reference  fla_reference::rwkv6::chunk_fwd
// Launch     a block has BK key and BV value channels of one segment and head: a warp for every 16 of BV, and PREP_WARPS
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
    float* o_parts;              // [K / BK, B, T, H, V]  of o; unused when a block has all of K
    i64 t;
    i64 o_len;                   // B T H V
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
    Cfg::BK;           // key channels of a block: a multiple of 16, alike in all passes
    Cfg::BV;           // value channels of a block
    Cfg::PREP_WARPS;   // warps that only make operands; 0: those of the state do
    Cfg::OUTPUT;       // o is wanted
    Cfg::KEEP_STATES;  // states are wanted
    Cfg::LOCAL;        // states of segments are wanted, and nothing else
};

template <class Cfg>
struct ChunkFwdStage {
    TokenTile<typename Cfg::Element, Cfg::BK> r, k, w;
};

// What a chunk's tokens are to the state.
template <class Cfg>
struct ChunkFwdOperands {
    BlockTile<PARTS<Cfg>, CHUNK, Cfg::BK> reads, writes;  // |scale| r reads and k writes of (1)
    alignas(16) float end[Cfg::BK];                       // (2)
};

// Chunks on their way through a block: tokens come, operands and each slice's part of the scores are made of them, the
// parts are added up, and the state takes all of it. A block barrier is between one step and the next.
template <class Cfg>
struct ChunkFwdShared {
    ChunkFwdStage<Cfg> stages[2];
    TokenTile<typename Cfg::Element, Cfg::BV> v[4];
    ChunkFwdOperands<Cfg> operands[3];
    AccTile parts[2][Cfg::BK / 16];  // of A, from each slice of K; what is above the diagonal is anything
    AccTile scores[2];               // A
    DecaySums sums;
    alignas(16) float u[Cfg::BK];
    alignas(16) float decay[Cfg::BK];   // of the segment so far, with LOCAL
};

// Sums of log decays, [tokens, channels].
template <int P>
__device__ Acc16 sum_decays(const FragA<1>& sum, const FragB<P>& w) {
    Acc16 d;
    zero(d);
    mma(d, sum, w);
    return d;
}

// scale e^x
__device__ inline Acc16 scaled_exp(Acc16 x, float log2_scale) {
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) x.at[n][e] = exp2_approx(x.at[n][e] * LOG2_E + log2_scale);
    }
    return x;
}

// (3) of 16 channels below the diagonal, level by level.
template <class Cfg>
__device__ __noinline__ Acc16 scores_of_levels(
    const DecaySums& s_sums, const ChunkFwdStage<Cfg>& stage, int col0, float scale
) {
    const FragB<DECAY_PARTS<Cfg>> w = load_decay<Cfg>(stage.w, col0);
    const Acc16 r = scale * load_acc(stage.r, col0), k = load_acc(stage.k, col0);
    Acc16 scores;
    zero(scores);
    #pragma unroll 1
    for (int level = 0; level < 4; ++level) {
        const Acc16 factor = exp_approx(sum_decays(load_a(s_sums.of[LEVELS + level], 0, 0), w));
        Acc16 d;
        zero(d);
        mma_pairs(d, to_pair<Cfg>(r * factor), to_pair<Cfg>(k * factor));
        keep_level<false>(d, level);
        scores = scores + d;
    }
    return scores;
}

// (1) to (3) for 16 channels.
template <class Cfg>
__device__ void prepare(
    ChunkFwdShared<Cfg>& s, ChunkFwdOperands<Cfg>& s_to, AccTile& s_part, const ChunkFwdStage<Cfg>& stage, int col0,
    float scale, float log2_scale, const FragA<1> (&sums)[2]
) {
    constexpr int P = PARTS<Cfg>;
    const int g = lane_id() / 4, t = lane_id() % 4;
    const FragB<DECAY_PARTS<Cfg>> w = load_decay<Cfg>(stage.w, col0);
    const Acc16 sum_writes = sum_decays(sums[WRITES], w);
    const Acc16 k = load_acc(stage.k, col0), k_writes = k * exp_approx(sum_writes);
    store_a(s_to.writes, 0, col0, to_a<P>(k_writes));
    // The lane's channels are 8 n + 2 t and the next. Lanes of g = 0 have the first token, after which `sum_writes` are.
    float2 total[2];
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        const int col = col0 + 8 * n + 2 * t;
        const float2 first = load_pair(stage.w, 0, col);
        total[n].x = __shfl_sync(FULL_WARP, sum_writes.at[n][0], t) + max(first.x, LEAST_DECAY);
        total[n].y = __shfl_sync(FULL_WARP, sum_writes.at[n][1], t) + max(first.y, LEAST_DECAY);
        if (g == 0) {
            const float2 end = {exp_approx(total[n].x), exp_approx(total[n].y)};
            reinterpret_cast<float2&>(s_to.end[col]) = end;
            if constexpr (Cfg::LOCAL) {
                float2& decay = reinterpret_cast<float2&>(s.decay[col]);
                decay = {decay.x * end.x, decay.y * end.y};
            }
        }
    }
    if constexpr (Cfg::OUTPUT) {
        const Acc16 r = load_acc(stage.r, col0), r_reads = r * scaled_exp(sum_decays(sums[READS], w), log2_scale);
        store_a(s_to.reads, 0, col0, to_a<P>(r_reads));
        Acc16 scores;
        const float least = fminf(fminf(total[0].x, total[0].y), fminf(total[1].x, total[1].y));
        if (__any_sync(FULL_WARP, least < -PAIR_SPAN)) {
            scores = scores_of_levels<Cfg>(s.sums, stage, col0, scale);
        } else {
            Acc16 k_pairs = k_writes;
            #pragma unroll
            for (int n = 0; n < 2; ++n) {
                const float x = exp_approx(-total[n].x), y = exp_approx(-total[n].y);
                #pragma unroll
                for (int e = 0; e < 4; ++e) k_pairs.at[n][e] *= e % 2 == 0 ? x : y;
            }
            zero(scores);
            mma_pairs(scores, to_pair<Cfg>(r_reads), to_pair<Cfg>(k_pairs));
        }
        // The diagonal: of rows g and g + 8.
        const Acc16 rk = r * k;
        float bonus[2] = {};
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            const float2 u = *reinterpret_cast<const float2*>(&s.u[col0 + 8 * n + 2 * t]);
            #pragma unroll
            for (int e = 0; e < 4; ++e) bonus[e / 2] += rk.at[n][e] * (e % 2 == 0 ? u.x : u.y);
        }
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float sum = group_sum<4>(bonus[i]);
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                float& x = scores.at[i][2 * i + e];
                x = g == 2 * t + e ? sum : x;
            }
        }
        s_part.put(scores);
    }
}

template <ChunkFwdConfig Cfg>
__device__ void chunk_fwd(const ChunkFwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    constexpr int K = Cfg::K, V = Cfg::V, BK = Cfg::BK, P = PARTS<Cfg>;
    constexpr int STATE_WARPS = Cfg::BV / 16, PREP_WARPS = Cfg::PREP_WARPS, THREADS = 32 * (STATE_WARPS + PREP_WARPS);
    constexpr int MAKERS = PREP_WARPS == 0 ? STATE_WARPS : PREP_WARPS, SLICES = BK / 16;
    static_assert(Cfg::OUTPUT + Cfg::LOCAL + Cfg::KEEP_STATES > 0 && !(Cfg::LOCAL && (Cfg::OUTPUT || Cfg::KEEP_STATES)));
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkFwdShared<Cfg>*>(s_bytes);
    const Work<Cfg> work(p);
    // The last segment's state is nobody's start.
    if (work.is_nothing() || (Cfg::LOCAL && work.is_last())) return;
    const int i_warp = threadIdx.x / 32, count = work.chunks.count;
    // The sign is the output's.
    const float scale = fabsf(p.scale), log2_scale = log2f(scale);
    const i32 stride_k = p.h * K, stride_v = p.h * V;  // 16 rows of them are less than 2^31 elements
    const i64 at_k = (work.bos * p.h + work.i_h) * K + work.k0, at_v = (work.bos * p.h + work.i_h) * V;

    const Element* src_r = p.r + at_k;
    const Element* src_k = p.k + at_k;
    const Element* src_w = p.w + at_k;
    const Element* src_v = p.v + at_v + work.v0;
    // Those that make operands also copy tokens.
    const bool is_maker = PREP_WARPS == 0 || i_warp >= STATE_WARPS;
    const int i_maker = PREP_WARPS == 0 ? i_warp : i_warp - STATE_WARPS;
    const int i_thread = PREP_WARPS == 0 ? threadIdx.x : threadIdx.x - 32 * STATE_WARPS;
    const auto fetch = [&](int i) {
        if (i < count && is_maker) {
            ChunkFwdStage<Cfg>& stage = s.stages[i % 2];
            const int rows = work.chunks.rows(i);
            if constexpr (Cfg::OUTPUT) load_tokens<K, 32 * MAKERS>(stage.r, src_r, stride_k, rows, K - work.k0, i_thread);
            load_tokens<K, 32 * MAKERS>(stage.k, src_k, stride_k, rows, K - work.k0, i_thread);
            load_tokens<K, 32 * MAKERS>(stage.w, src_w, stride_k, rows, K - work.k0, i_thread);
            load_tokens<V, 32 * MAKERS>(s.v[i % 4], src_v, stride_v, rows, V - work.v0, i_thread);
            src_r += CHUNK * stride_k;
            src_k += CHUNK * stride_k;
            src_w += CHUNK * stride_k;
            src_v += CHUNK * stride_v;
        }
        cp_async_commit_group();
    };
    fetch(0);
    fetch(1);
    init(s.sums);
    for (int i = threadIdx.x; i < BK; i += THREADS) {
        const int i_k = work.k0 + i;
        s.u[i] = Cfg::OUTPUT && i_k < K ? scale * to_f32(p.u[work.i_h * K + i_k]) : 0.0f;
        s.decay[i] = 1.0f;
    }

    FragA<1> sums[2];
    int i_operands = 0;  // where the next operands go
    const auto prepare_chunk = [&](int i) {
        if (i < count && is_maker) {
            const auto prepare_slice = [&](int j) {
                AccTile& part = s.parts[i % 2][j];
                prepare<Cfg>(s, s.operands[i_operands], part, s.stages[i % 2], 16 * j, scale, log2_scale, sums);
            };
            if constexpr (SLICES == MAKERS) {
                prepare_slice(i_maker);
            } else {
                #pragma unroll 1
                for (int j = i_maker; j < SLICES; j += MAKERS) prepare_slice(j);
            }
        }
        i_operands = i_operands == 2 ? 0 : i_operands + 1;
    };
    const auto add_parts_of = [&](int i) {
        if (Cfg::OUTPUT && i < count) add_parts<Cfg, THREADS, false>(s.scores[i % 2], s.parts[i % 2]);
    };
    cp_async_wait_group<1>();
    __syncthreads();  // the first chunk's tokens, sums and u are there
    sums[READS] = load_a(s.sums.of[READS], 0, 0);
    sums[WRITES] = load_a(s.sums.of[WRITES], 0, 0);
    prepare_chunk(0);
    cp_async_wait_group<0>();
    __syncthreads();  // the first chunk's parts and the second's tokens are there
    fetch(2);
    add_parts_of(0);
    prepare_chunk(1);
    const auto next_step = [&](int i) {
        cp_async_wait_group<0>();
        __syncthreads();  // one step is done: of this chunk, of the next, and tokens of the one after that are there
        fetch(i + 3);
        add_parts_of(i + 1);
    };
    if constexpr (PREP_WARPS > 0) {
        if (is_maker) {
            #pragma unroll 1
            for (int i = 0; i < count; ++i) {
                next_step(i);
                prepare_chunk(i + 2);
            }
            if (Cfg::LOCAL) __syncthreads();  // the segment's decay is there
            return;
        }
    }

    // Rows of V of the state: tile j has key channels 16 j to 16 j + 16.
    const int col_v = 16 * i_warp, v0 = work.v0 + col_v;
    const bool has_rows = VP<Cfg> % Cfg::BV == 0 || v0 < VP<Cfg>;
    const i64 at_state = ((work.i_n * p.h + work.i_h) * K + work.k0) * V;
    Acc16 state[SLICES];
    const auto for_state = [&](auto f) {
        #pragma unroll
        for (int j = 0; j < SLICES; ++j) {
            for_each(state[j], [&](int row, int col, float& x) {
                if (v0 + row < V && work.k0 + 16 * j + col < K) f(at_state + i64(16 * j + col) * V + v0 + row, x);
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
    const auto local_tile = [&](int j) { return (work.k0 / 16 + j) * (VP<Cfg> / 16) + v0 / 16; };
    if (!Cfg::LOCAL) {
        for (int i = 0; i < work.i_segment; ++i) {
            const float* decay = p.local_decays + (work.i_local + i) * KP<Cfg> + work.k0;
            const float* local = p.local_states + (work.i_local + i) * LOCAL_STATE<Cfg>;
            #pragma unroll
            for (int j = 0; j < SLICES; ++j) {
                scale_state(j, decay);
                if (has_rows) state[j] = state[j] + load_local(local, local_tile(j));
            }
        }
    }

    int i_taken = 0;  // which operands are this chunk's
    OverK<Cfg>* o_chunk;
    if constexpr (IS_SLICED_K<Cfg>) o_chunk = p.o_parts + work.k0 / BK * p.o_len + at_v;
    else o_chunk = p.o + at_v;
    u32* image = reinterpret_cast<u32*>(p.states) + (work.first_chunk * p.h + work.i_h) * IMAGE_WORDS<Cfg>;
    #pragma unroll 1
    for (int i = 0; i < count; ++i) {
        next_step(i);
        const ChunkFwdOperands<Cfg>& operands = s.operands[i_taken];
        i_taken = i_taken == 2 ? 0 : i_taken + 1;
        const FragA<P> v = load_a_transposed<P>(s.v[i % 4], col_v);
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
                        if (has_rows) st_global(image + image_tile<Cfg>(part, work.k0 + 16 * j, v0), words);
                    }
                }
            }
            scale_state(j, operands.end);
            mma(state[j], v, load_b(operands.writes, 0, 16 * j));
        }
        if constexpr (Cfg::OUTPUT) {
            mma_pairs(o, to_pair<Cfg>(v), to_pair<Cfg>(s.scores[i % 2].get()));
            if (p.scale < 0.0f) o = -1.0f * o;
            if (has_rows) store_transposed<V>(o_chunk, stride_v, o, v0, work.chunks.rows(i));
            o_chunk += CHUNK * i64(stride_v);
        }
        if constexpr (Cfg::KEEP_STATES) image += p.h * IMAGE_WORDS<Cfg>;
        if (PREP_WARPS == 0) prepare_chunk(i + 2);
    }

    if constexpr (Cfg::LOCAL) {
        float* local = p.local_states + (work.i_local + work.i_segment) * LOCAL_STATE<Cfg>;
        #pragma unroll
        for (int j = 0; j < SLICES; ++j) {
            if (has_rows) store_local(local, local_tile(j), state[j]);
        }
        __syncthreads();  // the segment's decay is there: a channel's product is one lane's, of whichever warp
        float* decay = p.local_decays + (work.i_local + work.i_segment) * KP<Cfg> + work.k0;
        if (work.v0 == 0) {
            for (int i = threadIdx.x; i < BK; i += 32 * STATE_WARPS) decay[i] = s.decay[i];
        }
    } else if (p.final_state != nullptr && work.is_last()) {
        for_state([&](i64 i, float& x) { p.final_state[i] = x; });
    }
}

}  // namespace fla::rwkv6
