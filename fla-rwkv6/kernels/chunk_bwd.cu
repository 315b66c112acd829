// chunk_bwd: gradients of RWKV-6 in chunks of 16 tokens, from the last to the first, on tensor cores.
//
// With the factors of `chunk.cuh`, S the state before a chunk as the forward pass has kept it, and D the gradient of the
// state after it, both [K, V]:
//
//   dA = d_o v^T            X = S d_o^T          Y = D v^T                                                      (4)
//   dv = A^T d_o + (k writes) D                                                                                 (5)
//   dr_i = scale (reads_i X_i + sum_{j < i} dA_ij k_j e^{sum of w between} + dA_ii u k_i)                       (6)
//   dk_j = writes_j Y_j + scale (sum_{i > j} dA_ij r_i e^{sum of w between} + dA_jj u r_j)                      (7)
//   dw_t = scale sum_{i > t} (r reads X)_i + sum_{j < t} (k writes Y)_j + end sum_v S D
//        + what pairs with j < t < i are                                                                        (8)
//   du   = scale sum_t dA_tt r_t k_t                                                                            (9)
//   D   <- diag(end) D + scale (r reads)^T d_o                                                                 (10)
//
// Each warp has 16 key channels of D in registers, as accumulators of (10), which are the left operands of (4) as they lie;
// S comes from memory in the same order. So all of (4) to (10) is a warp's own but for (5), whose sum over K takes D, the
// factors and the scores from shared memory.
//
// A factor of a pair is e to a sum of log decays that a matrix of 0 and 1 has picked, so its part of (8) is that matrix's
// transpose times what the factor's gradient is. With the reference at the chunk's start what writes has one over the decay
// through its own token: pairs on one side of t then cancel in (8), and are the same rounded numbers, so that only rounding of
// f32 is left.
//
// With few heads a sequence is cut into segments, and the kernel runs twice: with LOCAL for the D that a segment adds to what
// comes from those after it, and its decay; then each segment folds those after it into the D that it starts from.
//
// A wide K is cut into slices, as in `chunk_fwd`; all but (5) is a slice's own, and its part of (5) is one of those that
// `chunk_bwd_output` adds up.
//
// Reference  fla_reference::rwkv6::chunk_bwd
// Launch     a block has BK key and BV value channels of one segment and head: a warp for every 16 of BK
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
struct ChunkBwdParams {
    const Element* r;            // [B, T, H, K]
    const Element* k;            // [B, T, H, K]  unused with LOCAL
    const Element* v;            // [B, T, H, V]  unused with LOCAL
    const Element* w;            // [B, T, H, K]  log decay, natural base, at most 0
    const Element* u;            // [H, K]        bonus
    const u16* states;           // [NT, H, PARTS, K / 16, V / 16, 32, 8]  state before every chunk
    const Element* d_o;          // [B, T, H, V]
    const float* d_final_state;  // [N, H, K, V]  null: zero
    const i64* cu_seqlens;       // [N + 1]       null: N dense sequences of t tokens
    const i64* chunk_offsets;    // [N + 1]       chunks before each sequence; null: dense
    Element* dr;                 // [B, T, H, K]
    Element* dk;                 // [B, T, H, K]
    Element* dv;                 // [B, T, H, V]
    Element* dw;                 // [B, T, H, K]
    float* du_parts;             // [V / BV, N, max_segments, H, K]
    float* d_initial_state;      // [N, H, K, V]  null: not wanted
    float* partial;              // [V / BV, 3, B, T, H, K]  of dr, dk and dw; unused when a block has all of V
    float* local_states;         // [N, H, max_segments, K / 16 V / 16 256]  D of segments; written with LOCAL, else read
    float* local_decays;         // [N, H, max_segments, K]
    float* dv_parts;             // [K / BK, B, T, H, V]  of dv; unused when a block has all of K
    i64 n;
    i64 t;
    i64 partial_len;             // B T H K
    i64 dv_len;                  // B T H V
    i32 h;
    i32 segment_chunks;          // chunks of a segment
    i32 max_segments;            // of a sequence; 1: none is cut
    float scale;
};

template <class Cfg>
concept ChunkBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;       // key channels
    Cfg::V;       // value channels
    Cfg::BK;      // key channels of a block: a multiple of 16, alike in all passes
    Cfg::BV;      // value channels of a block
    Cfg::STAGES;  // chunks in shared memory: 2 or 3
    Cfg::LOCAL;   // D of segments is wanted, and nothing else
};

template <class Cfg>
struct ChunkBwdStage {
    using Element = typename Cfg::Element;
    TokenTile<Element, Cfg::BK> r, k, w;
    TokenTile<Element, Cfg::BV> v, d_o;
};

template <class Cfg>
struct ChunkBwdShared {
    ChunkBwdStage<Cfg> stages[Cfg::STAGES];
    // S of a chunk and of the next, in the order of `image_tile`: what each warp reads of it.
    alignas(16) u32 state[2][Cfg::BK / 16][PARTS<Cfg>][Cfg::BV / 16][128];
    // What (5) is made of.
    BlockTile<PARTS<Cfg>, Cfg::BK, Cfg::BV> d_state;
    BlockTile<PARTS<Cfg>, Cfg::BK, CHUNK> writes;  // k writes, transposed
    AccTile parts[Cfg::BK / 16];                   // of A^T, from each slice of K; one side of the diagonal is anything
    AccTile scores;                                // A^T; unused where slices are few
    DecaySums sums;
};

// Sums of log decays, [channels, tokens].
template <int P>
__device__ Acc16 sum_decays(const FragA<P>& w, const FragB<1>& sum) {
    Acc16 d;
    zero(d);
    mma(d, w, sum);
    return d;
}

// dw += what is summed up of x, where a factor's gradient times the factor is x.
template <int P>
__device__ void add_decay_grad(Acc16& dw, const Acc16& x, const FragB<1>& sum) {
    mma(dw, to_a<P>(x), sum);
}

// Parts of what is summed up for dw: where pairs cancel, f32 must be left of them.
inline constexpr int CANCELLING_PARTS = 3, SUM_PARTS = 2;

// d[channel, token] *= by[channel]
__device__ inline void scale_rows(Acc16& d, const float (&by)[2]) {
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) d.at[n][e] *= by[e / 2];
    }
}

// One gradient of 16 key channels, from its transpose: to its tensor, or as this block's part of it.
template <class Cfg, class Element>
__device__ void store_grad(Element* dst, float* partial, i32 stride, Acc16& d, int col0, int rows) {
    if constexpr (Cfg::V > Cfg::BV) {
        for_each(d, [&](int channel, int row, float& x) {
            if (row < rows && col0 + channel < Cfg::K) partial[row * stride + col0 + channel] = x;
        });
    } else {
        // Slices that are alike may have a tile too many.
        if (KP<Cfg> - Cfg::K < 16 || col0 < Cfg::K) store_transposed<Cfg::K>(dst, stride, d, col0, rows);
    }
}

// d += A^T, of [channels, tokens] that write and that read.
__device__ inline void add_scores(Acc16& d, const Acc16& writes, const Acc16& reads) {
    // The sum is over channels, which are rows here: 8x8 loads and what turns registers over know 16-bit numbers only.
    mma(d, transposed(to_a<2>(writes)), to_b_transposed(transposed(to_a<2>(reads))));
}

// Gradients of 16 channels, [channels, tokens], and their part of A^T.
struct Slice {
    Acc16 dr, dk, dw, scores;
};

// The pairs of 16 channels level by level, added to d.
template <class Cfg>
__device__ void add_levels(
    Slice& d, const DecaySums& s_sums, const ChunkBwdStage<Cfg>& stage, const Acc16& d_scores, const Acc16& d_scores_t,
    int col0, float scale
) {
    const FragA<DECAY_PARTS<Cfg>> w = to_a_transposed(load_decay<Cfg>(stage.w, col0));
    #pragma unroll 1
    for (int level = 0; level < 4; ++level) {
        Acc16 factor = exp_approx(sum_decays(w, load_b_transposed(s_sums.of[LEVELS + level], 0, 0)));
        PairOperand<Cfg> q, k;
        {
            const Acc16 reads = load_acc_transposed(stage.r, col0) * (scale * factor);
            const Acc16 writes = load_acc_transposed(stage.k, col0) * factor;
            Acc16 x;
            zero(x);
            add_scores(x, writes, reads);
            keep_level<true>(x, level);
            d.scores = d.scores + x;
            q = to_pair<Cfg>(reads);
            k = to_pair<Cfg>(writes);
        }
        Acc16 d_pairs = d_scores, x;
        keep_level<false>(d_pairs, level);
        zero(x);
        mma_pairs(x, k, to_pair<Cfg>(d_pairs));
        d.dr = d.dr + scale * (factor * x);
        add_decay_grad<CANCELLING_PARTS>(d.dw, value(q) * x, load_b(s_sums.of[LEVELS + level], 0, 0));
        d_pairs = d_scores_t;
        keep_level<true>(d_pairs, level);
        zero(x);
        mma_pairs(x, q, to_pair<Cfg>(d_pairs));
        d.dk = d.dk + factor * x;
        add_decay_grad<CANCELLING_PARTS>(d.dw, value(k) * x, load_b(s_sums.of[LEVELS + level], 0, 0));
    }
}

// The decay of 16 channels over a chunk, of a lane's two.
struct Total {
    float log[2], end[2];
};

template <class Cfg>
__device__ Total total_of(const ChunkBwdStage<Cfg>& stage, const Acc16& sum_writes, int col0) {
    const int g = lane_id() / 4;
    Total total;
    #pragma unroll
    for (int e = 0; e < 2; ++e) {
        // The first lane of a row has the first token, after which `sum_writes` are.
        const float first = max(to_f32(stage.w.at(0, col0 + g + 8 * e)), LEAST_DECAY);
        total.log[e] = __shfl_sync(FULL_WARP, sum_writes.at[0][2 * e], 4 * g) + first;
        total.end[e] = exp_approx(total.log[e]);
    }
    return total;
}

template <ChunkBwdConfig Cfg>
__device__ void chunk_bwd(const ChunkBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using Stage = ChunkBwdStage<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V, BK = Cfg::BK, BV = Cfg::BV, STAGES = Cfg::STAGES, P = PARTS<Cfg>;
    constexpr int WARPS = BK / 16, THREADS = 32 * WARPS, TILES = BV / 16;
    // Of each chunk the state is copied before the tokens of a later one: what waits for the one lets the other go on.
    static_assert(STAGES == 2 || STAGES == 3, "copies of one chunk's tokens may be under way");
    // Whether parts of scores are added up by all threads at once, or by each warp for itself, which saves a barrier.
    constexpr bool MANY_SLICES = WARPS > 4;
    constexpr int DV_UNROLL = BV <= 64 ? 4 : 2;  // D takes the registers
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkBwdShared<Cfg>*>(s_bytes);
    const Work<Cfg> work(p);
    const int i_slice = threadIdx.x / 32, g = lane_id() / 4, t = lane_id() % 4, col0 = 16 * i_slice;
    const int k0 = work.k0 + col0;  // of a head; `col0` is of the block
    const int count = work.chunks.count;
    const i64 at_hk = work.i_h * K + k0 + g;  // this lane's channels of a head are this and 8 more
    float* du = p.du_parts +
        ((i64(work.v0 / BV) * p.n + work.i_n) * p.max_segments + work.i_segment) * (i64(p.h) * K) + at_hk;
    const auto store_du = [&](const float (&x)[2]) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (t == 0 && k0 + g + 8 * i < K) du[8 * i] = x[i];
        }
    };
    float r_du[2] = {};
    if (work.is_nothing()) {
        if (!Cfg::LOCAL) store_du(r_du);
        return;
    }
    // What the first segment adds goes to nobody.
    if (Cfg::LOCAL && work.i_segment == 0) return;
    const i32 stride_k = p.h * K, stride_v = p.h * V;  // 16 rows of them are less than 2^31 elements
    const i64 at_k = (work.bos * p.h + work.i_h) * K, at_v = (work.bos * p.h + work.i_h) * V;

    const i64 last_k = at_k + (count - 1) * (CHUNK * i64(stride_k)), last_v = at_v + (count - 1) * (CHUNK * i64(stride_v));
    const Element* src_w = p.w + last_k + work.k0;
    const Element* src_r = p.r + last_k + work.k0;
    const Element* src_k = p.k + last_k + work.k0;
    const Element* src_v = p.v + last_v + work.v0;
    const Element* src_d_o = p.d_o + last_v + work.v0;
    const auto fetch = [&](int i, int i_stage) {
        if (i < count) {
            Stage& stage = s.stages[i_stage];
            const int rows = work.chunks.rows(count - 1 - i);
            load_tokens<K, THREADS>(stage.w, src_w, stride_k, rows, K - work.k0, threadIdx.x);
            load_tokens<K, THREADS>(stage.r, src_r, stride_k, rows, K - work.k0, threadIdx.x);
            load_tokens<V, THREADS>(stage.d_o, src_d_o, stride_v, rows, V - work.v0, threadIdx.x);
            if constexpr (!Cfg::LOCAL) {
                load_tokens<K, THREADS>(stage.k, src_k, stride_k, rows, K - work.k0, threadIdx.x);
                load_tokens<V, THREADS>(stage.v, src_v, stride_v, rows, V - work.v0, threadIdx.x);
            }
            src_w -= CHUNK * stride_k;
            src_r -= CHUNK * stride_k;
            src_k -= CHUNK * stride_k;
            src_v -= CHUNK * stride_v;
            src_d_o -= CHUNK * stride_v;
        }
        cp_async_commit_group();
    };
    // Every warp copies its own part of S.
    const u32* image = reinterpret_cast<const u32*>(p.states) +
        ((work.first_chunk + count - 1) * p.h + work.i_h) * IMAGE_WORDS<Cfg>;
    const auto has_tile = [&](int j) { return VP<Cfg> % BV == 0 || work.v0 + 16 * j < VP<Cfg>; };
    const auto fetch_state = [&](int i) {
        if (!Cfg::LOCAL && i < count) {
            #pragma unroll
            for (int part = 0; part < P; ++part) {
                #pragma unroll
                for (int j = 0; j < TILES; ++j) {
                    const u32* src = image + (has_tile(j) ? image_tile<Cfg>(part, k0, work.v0 + 16 * j) : 0);
                    cp_async_cg_16(&s.state[i % 2][i_slice][part][j][4 * lane_id()], src, has_tile(j) ? 16 : 0);
                }
            }
            image -= p.h * IMAGE_WORDS<Cfg>;
        }
        cp_async_commit_group();
    };
    fetch_state(0);
    #pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) fetch(i, i);
    init(s.sums);
    int i_stage = 0;
    const auto next_stage = [&](int i) -> const Stage& {
        cp_async_wait_group<STAGES - 2>();
        __syncthreads();  // this chunk's tokens and S are there, and the last chunk's and what (5) took are free
        fetch_state(i + 1);
        fetch(i + STAGES - 1, i_stage == 0 ? STAGES - 1 : i_stage - 1);
        const Stage& stage = s.stages[i_stage];
        i_stage = i_stage + 1 == STAGES ? 0 : i_stage + 1;
        return stage;
    };

    // D: tile j has value channels 16 j to 16 j + 16 of the block's.
    const i64 at_state = (work.i_n * p.h + work.i_h) * K * V;
    Acc16 d_state[TILES];
    const auto for_state = [&](auto f) {
        #pragma unroll
        for (int j = 0; j < TILES; ++j) {
            for_each(d_state[j], [&](int row, int col, float& x) {
                const int i_k = k0 + row, i_v = work.v0 + 16 * j + col;
                if (i_k < K && i_v < V) f(at_state + i64(i_k) * V + i_v, x);
            });
        }
    };
    const auto local_tile = [&](int j) { return k0 / 16 * (VP<Cfg> / 16) + work.v0 / 16 + j; };
    #pragma unroll
    for (int j = 0; j < TILES; ++j) zero(d_state[j]);
    if (!Cfg::LOCAL) {
        if (p.d_final_state != nullptr) for_state([&](i64 i, float& x) { x = p.d_final_state[i]; });
        for (int i = work.segments - 1; i > work.i_segment; --i) {
            const float* decays = p.local_decays + (work.i_local + i) * KP<Cfg> + k0 + g;
            const float* local = p.local_states + (work.i_local + i) * LOCAL_STATE<Cfg>;
            const float decay[2] = {decays[0], decays[8]};
            #pragma unroll
            for (int j = 0; j < TILES; ++j) {
                scale_rows(d_state[j], decay);
                if (has_tile(j)) d_state[j] = d_state[j] + load_local(local, local_tile(j));
            }
        }
    }
    if constexpr (Cfg::LOCAL) {
        float decay[2] = {1.0f, 1.0f};  // of the segment so far
        #pragma unroll 1
        for (int i = 0; i < count; ++i) {
            const Stage& stage = next_stage(i);
            const FragA<DECAY_PARTS<Cfg>> w = to_a_transposed(load_decay<Cfg>(stage.w, col0));
            const Total total = total_of<Cfg>(stage, sum_decays(w, load_b_transposed(s.sums.of[WRITES], 0, 0)), col0);
            const Acc16 read = p.scale * exp_approx(sum_decays(w, load_b_transposed(s.sums.of[READS], 0, 0)));
            const FragA<P> reads = to_a<P>(load_acc_transposed(stage.r, col0) * read);
            #pragma unroll
            for (int j = 0; j < TILES; ++j) {
                scale_rows(d_state[j], total.end);
                mma(d_state[j], reads, load_b<P>(stage.d_o, 16 * j));
            }
            decay[0] *= total.end[0];
            decay[1] *= total.end[1];
        }
        float* local = p.local_states + (work.i_local + work.i_segment) * LOCAL_STATE<Cfg>;
        #pragma unroll
        for (int j = 0; j < TILES; ++j) {
            if (has_tile(j)) store_local(local, local_tile(j), d_state[j]);
        }
        float* decays = p.local_decays + (work.i_local + work.i_segment) * KP<Cfg> + k0 + g;
        if (work.v0 == 0 && t == 0) {
            decays[0] = decay[0];
            decays[8] = decay[1];
        }
        return;
    }

    float u[2];
    #pragma unroll
    for (int i = 0; i < 2; ++i) u[i] = k0 + g + 8 * i < K ? to_f32(p.u[at_hk + 8 * i]) : 0.0f;
    OverK<Cfg>* dv_chunk;
    if constexpr (IS_SLICED_K<Cfg>) dv_chunk = p.dv_parts + work.k0 / BK * p.dv_len + last_v;
    else dv_chunk = p.dv + last_v;
    i64 at = last_k;
    #pragma unroll 1
    for (int i = 0; i < count; ++i) {
        const Stage& stage = next_stage(i);
        const int rows = work.chunks.rows(count - 1 - i);
        // What is before a token, and what is after it; each is the transpose of the other.
        const FragB<1> before = load_b_transposed(s.sums.of[READS], 0, 0), after = load_b_transposed(s.sums.of[WRITES], 0, 0);
        const FragA<DECAY_PARTS<Cfg>> w = to_a_transposed(load_decay<Cfg>(stage.w, col0));
        const Acc16 sum_writes = sum_decays(w, after);
        const Total total = total_of<Cfg>(stage, sum_writes, col0);
        const bool is_wide =
            __any_sync(FULL_WARP, fminf(total.log[0], total.log[1]) < -PAIR_SPAN || has_step(to_b_transposed(w)));
        const Acc16 read = p.scale * exp_approx(sum_decays(w, before)), write = exp_approx(sum_writes);
        const Acc16 r_reads = load_acc_transposed(stage.r, col0) * read;
        const Acc16 k_writes = load_acc_transposed(stage.k, col0) * write;
        const FragA<P> left_reads = to_a<P>(r_reads);
        store_a(s.writes, col0, 0, to_a<P>(k_writes));

        // (4), (10), and what of (6) to (8) is S and D
        Acc16 d_scores, d_scores_t, x, y;
        zero(d_scores);
        zero(d_scores_t);
        zero(x);
        zero(y);
        float state_sum[2] = {};
        #pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const FragA<P> d_o = load_a<P>(stage.d_o, 16 * j), left_d_state = to_a<P>(d_state[j]);
            const FragB<P> v = load_b_transposed<P>(stage.v, 16 * j);
            mma(d_scores, d_o, v);
            mma(d_scores_t, to_a_transposed(v), to_b_transposed(d_o));
            FragA<P> state;
            #pragma unroll
            for (int part = 0; part < P; ++part) {
                const Words<4> words = reinterpret_cast<const Words<4>&>(s.state[i % 2][i_slice][part][j][4 * lane_id()]);
                #pragma unroll
                for (int e = 0; e < 4; ++e) state.at[part][e] = words.at[e];
            }
            mma(x, state, to_b_transposed(d_o));
            mma(y, left_d_state, v);
            store_a(s.d_state, col0, 16 * j, left_d_state);
            const Acc16 wide_state = to_acc(state);
            #pragma unroll
            for (int n = 0; n < 2; ++n) {
                #pragma unroll
                for (int e = 0; e < 4; ++e) state_sum[e / 2] += wide_state.at[n][e] * d_state[j].at[n][e];
            }
            scale_rows(d_state[j], total.end);
            mma(d_state[j], left_reads, load_b<P>(stage.d_o, 16 * j));
        }
        Slice d;
        #pragma unroll
        for (int e = 0; e < 2; ++e) state_sum[e] = group_sum<4>(state_sum[e]) * total.end[e];
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) d.dw.at[n][e] = state_sum[e / 2];
        }
        add_decay_grad<SUM_PARTS>(d.dw, k_writes * y, before);
        Acc16 product = r_reads * x;
        d.dr = read * x;
        d.dk = write * y;
        zero(d.scores);

        // And what pairs are
        if (is_wide) {
            add_levels<Cfg>(d, s.sums, stage, d_scores, d_scores_t, col0, p.scale);
        } else {
            const float split[2] = {exp_approx(-total.log[0]), exp_approx(-total.log[1])};
            Acc16 k_pairs = k_writes;
            scale_rows(k_pairs, split);
            // What is on the wrong side of the diagonal is cut off when the slices have been added up.
            add_scores(d.scores, k_pairs, r_reads);
            const PairOperand<Cfg> left_q = to_pair<Cfg>(r_reads), left_k = to_pair<Cfg>(k_pairs);
            Acc16 below = d_scores, pairs;
            keep_below<false, false>(below);
            zero(pairs);
            mma_pairs(pairs, left_k, to_pair<Cfg>(below));
            d.dr = d.dr + read * pairs;
            product = product + value(left_q) * pairs;
            below = d_scores_t;
            keep_below<false, true>(below);
            zero(pairs);
            mma_pairs(pairs, left_q, to_pair<Cfg>(below));
            // A token's own decay is in the factor of what it writes, and not in that of what it reads.
            const Acc16 own = value(left_k) * pairs;
            d.dw = d.dw + -1.0f * own;
            product = product + -1.0f * own;
            scale_rows(pairs, split);
            d.dk = d.dk + write * pairs;
        }
        add_decay_grad<CANCELLING_PARTS>(d.dw, product, after);
        // The diagonal, (9) too. Token 8 n + 2 t + e of dA is at row 2 t + e of its half, half of that lane's columns.
        const Acc16 r = load_acc_transposed(stage.r, col0), k = load_acc_transposed(stage.k, col0), rk = r * k;
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float d_bonus = p.scale * __shfl_sync(FULL_WARP, d_scores.at[n][2 * n + e], 4 * (2 * t + e) + t);
                float bonus = 0.0f;
                #pragma unroll
                for (int i_row = 0; i_row < 2; ++i_row) {
                    const int at_row = 2 * i_row + e;
                    const float d_bonus_u = d_bonus * u[i_row];
                    d.dr.at[n][at_row] += d_bonus_u * k.at[n][at_row];
                    d.dk.at[n][at_row] += d_bonus_u * r.at[n][at_row];
                    r_du[i_row] += d_bonus * rk.at[n][at_row];
                    bonus += rk.at[n][at_row] * u[i_row];
                }
                bonus = p.scale * strided_sum<4>(bonus);
                float& score = d.scores.at[n][2 * n + e];
                score = g == 2 * t + e ? bonus : score;
            }
        }
        s.parts[i_slice].put(d.scores);
        __syncthreads();  // what (5) takes is there, the scores in parts
        if (MANY_SLICES) add_parts<Cfg, THREADS, true>(s.scores, s.parts);
        float* partial = p.partial + work.v0 / BV * 3 * p.partial_len + at;
        store_grad<Cfg>(p.dr + at, partial, stride_k, d.dr, k0, rows);
        store_grad<Cfg>(p.dk + at, partial + p.partial_len, stride_k, d.dk, k0, rows);
        store_grad<Cfg>(p.dw + at, partial + 2 * p.partial_len, stride_k, d.dw, k0, rows);
        at -= CHUNK * stride_k;
        if (MANY_SLICES) __syncthreads();  // the scores are there

        const auto store_dv = [&](int j) {
            Acc16 dv, other;  // two chains, as one product waits for the one before
            zero(dv);
            zero(other);
            #pragma unroll DV_UNROLL
            for (int i_k = 0; i_k < BK; i_k += 16) {
                mma(i_k / 16 % 2 == 0 ? dv : other, load_a_transposed(s.d_state, i_k, 16 * j), load_b(s.writes, i_k, 0));
            }
            Acc16 scores = MANY_SLICES ? s.scores.get() : s.parts[0].get();
            if constexpr (!MANY_SLICES) {
                #pragma unroll
                for (int i_k = 1; i_k < WARPS; ++i_k) scores = scores + s.parts[i_k].get();
                keep_below<true, true>(scores);
            }
            mma_pairs(other, to_pair<Cfg>(load_a_transposed<P>(stage.d_o, 16 * j)), to_pair<Cfg>(scores));
            dv = dv + other;
            if (has_tile(j)) store_transposed<V>(dv_chunk, stride_v, dv, work.v0 + 16 * j, rows);
        };
        if constexpr (TILES == WARPS) {
            store_dv(i_slice);
        } else {
            #pragma unroll 1
            for (int j = i_slice; j < TILES; j += WARPS) store_dv(j);
        }
        dv_chunk -= CHUNK * stride_v;
    }
    const float sums[2] = {group_sum<4>(r_du[0]), group_sum<4>(r_du[1])};
    store_du(sums);
    if (p.d_initial_state != nullptr && work.i_segment == 0) {
        for_state([&](i64 i, float& x) { p.d_initial_state[i] = x; });
    }
}

}  // namespace fla::rwkv6
