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
// A factor of a pair is e to a sum of log decays that a matrix of -1, 0 and 1 has picked, so its part of (8) is that matrix's
// transpose times what the factor's gradient is. Where the matrix has -1, pairs on one side of t cancel: they are the same
// rounded numbers, so that only rounding of f32 is left.
//
// With few heads a sequence is cut into segments, and the kernel runs twice: with LOCAL for the D that a segment adds to what
// comes from those after it, and its decay; then each segment folds those after it into the D that it starts from.
//
// Reference  fla_reference::rwkv6::chunk_bwd
// Launch     a block has BV value channels of one segment and head: a warp for every 16 key channels
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
    i64 n;
    i64 t;
    i64 partial_len;             // B T H K
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
    Cfg::BV;      // value channels of a block
    Cfg::STAGES;  // chunks in shared memory
    Cfg::LOCAL;   // D of segments is wanted, and nothing else
};

template <class Cfg>
struct ChunkBwdStage {
    using Element = typename Cfg::Element;
    TokenTile<Element, KP<Cfg>> r, k, w;
    TokenTile<Element, Cfg::BV> v, d_o;
};

template <class Cfg>
struct ChunkBwdShared {
    ChunkBwdStage<Cfg> stages[Cfg::STAGES];
    // What (5) is made of.
    BlockTile<PARTS<Cfg>, KP<Cfg>, Cfg::BV> d_state;
    BlockTile<PARTS<Cfg>, KP<Cfg>, CHUNK> writes;  // k writes, transposed
    AccTile scores[KP<Cfg> / 16];                  // A^T, what each slice of K adds
    DecaySums sums;
};

// Sums of log decays, [channels, tokens].
template <int P>
__device__ Acc16 sum_decays(const DecaySums& s, const FragA<P>& w, int sum) {
    Acc16 d;
    zero(d);
    mma(d, w, load_b_transposed(s.of[sum], 0, 0));
    return d;
}

// dw += the transpose of the matrix `sum` times x, where a factor's gradient times the factor is x.
template <int P>
__device__ void add_decay_grad(Acc16& dw, const DecaySums& s, const Acc16& x, int sum) {
    mma(dw, to_a<P>(x), load_b(s.of[sum], 0, 0));
}

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
        store_transposed<Cfg::K>(dst, stride, d, col0, rows);
    }
}

// Gradients of 16 key channels, [channels, tokens].
struct Grads {
    Acc16 dr, dk, dw;
};

// What pairs of tokens are in (6) to (8), and A^T, strictly below its diagonal.
template <class Cfg>
__device__ void add_pairs(
    Grads& d, Acc16& scores, const DecaySums& s_sums, const FragA<DECAY_PARTS<Cfg>>& w, const Acc16& r, const Acc16& k,
    const Acc16& d_scores, float scale, bool is_wide
) {
    for_pair_modes(is_wide, [&](int mode) {
        const int sum = pair_sum(mode), sum_of_writes = mode == CENTRED ? int(CENTRED_WRITES) : sum;
        Acc16 read = exp_approx(sum_decays(s_sums, w, sum));
        const Acc16 write = mode == CENTRED ? exp_approx(sum_decays(s_sums, w, sum_of_writes)) : read;
        read = scale * read;
        const FragA<PAIR_PARTS> q = to_a<PAIR_PARTS>(r * read), kk = to_a<PAIR_PARTS>(k * write);
        Acc16 x;
        zero(x);
        mma(x, transposed(kk), to_b_transposed(transposed(q)));
        for_each(x, [&](int row, int col, float& a) { a = is_pair(mode, col, row, false) ? a : 0.0f; });
        scores = scores + x;

        x = d_scores;
        for_each(x, [&](int row, int col, float& a) { a = is_pair(mode, row, col, false) ? a : 0.0f; });
        const FragA<PAIR_PARTS> d_pairs = to_a<PAIR_PARTS>(x);
        zero(x);
        mma<true>(x, kk, to_b_transposed(d_pairs));
        d.dr = d.dr + read * x;
        add_decay_grad<3>(d.dw, s_sums, to_acc(q) * x, sum);
        zero(x);
        mma<true>(x, q, to_b_transposed(transposed(d_pairs)));
        d.dk = d.dk + write * x;
        add_decay_grad<3>(d.dw, s_sums, to_acc(kk) * x, sum_of_writes);
    });
}

template <ChunkBwdConfig Cfg>
__device__ void chunk_bwd(const ChunkBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using Stage = ChunkBwdStage<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V, BV = Cfg::BV, STAGES = Cfg::STAGES, P = PARTS<Cfg>;
    constexpr int WARPS = KP<Cfg> / 16, THREADS = 32 * WARPS, TILES = BV / 16, STATE_GRAD_PARTS = 2;
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkBwdShared<Cfg>*>(s_bytes);
    const Work<Cfg> work(p);
    const int i_warp = threadIdx.x / 32, g = lane_id() / 4, t = lane_id() % 4, col0 = 16 * i_warp;
    const int count = work.chunks.count;
    const i64 at_hk = work.i_h * K + col0 + g;  // this lane's channels of a head are this and 8 more
    float* du = p.du_parts +
        ((i64(work.v0 / BV) * p.n + work.i_n) * p.max_segments + work.i_segment) * (i64(p.h) * K) + at_hk;
    const auto store_du = [&](const float (&x)[2]) {
        #pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (t == 0 && col0 + g + 8 * i < K) du[8 * i] = x[i];
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

    const auto fetch = [&](int i) {
        if (i < count) {
            Stage& stage = s.stages[i % STAGES];
            const int i_chunk = count - 1 - i, rows = work.chunks.rows(i_chunk);
            const i64 k0 = at_k + i_chunk * (CHUNK * i64(stride_k));
            const i64 v0 = at_v + i_chunk * (CHUNK * i64(stride_v)) + work.v0;
            load_tokens<K, THREADS>(stage.w, p.w + k0, stride_k, rows, K, threadIdx.x);
            load_tokens<K, THREADS>(stage.r, p.r + k0, stride_k, rows, K, threadIdx.x);
            load_tokens<V, THREADS>(stage.d_o, p.d_o + v0, stride_v, rows, V - work.v0, threadIdx.x);
            if constexpr (!Cfg::LOCAL) {
                load_tokens<K, THREADS>(stage.k, p.k + k0, stride_k, rows, K, threadIdx.x);
                load_tokens<V, THREADS>(stage.v, p.v + v0, stride_v, rows, V - work.v0, threadIdx.x);
            }
        }
        cp_async_commit_group();
    };
    #pragma unroll 1
    for (int i = 0; i < STAGES - 1; ++i) fetch(i);
    init(s.sums);

    float u[2];
    #pragma unroll
    for (int i = 0; i < 2; ++i) u[i] = !Cfg::LOCAL && col0 + g + 8 * i < K ? to_f32(p.u[at_hk + 8 * i]) : 0.0f;

    // D: tile j has value channels 16 j to 16 j + 16 of the block's.
    const i64 at_state = (work.i_n * p.h + work.i_h) * K * V;
    Acc16 d_state[TILES];
    const auto for_state = [&](auto f) {
        #pragma unroll
        for (int j = 0; j < TILES; ++j) {
            for_each(d_state[j], [&](int row, int col, float& x) {
                const int i_k = col0 + row, i_v = work.v0 + 16 * j + col;
                if (i_k < K && i_v < V) f(at_state + i64(i_k) * V + i_v, x);
            });
        }
    };
    const auto has_tile = [&](int j) { return VP<Cfg> % BV == 0 || work.v0 + 16 * j < VP<Cfg>; };
    const auto local_tile = [&](int j) { return i_warp * (VP<Cfg> / 16) + work.v0 / 16 + j; };
    #pragma unroll
    for (int j = 0; j < TILES; ++j) zero(d_state[j]);
    if (!Cfg::LOCAL) {
        if (p.d_final_state != nullptr) for_state([&](i64 i, float& x) { x = p.d_final_state[i]; });
        for (int i = work.segments - 1; i > work.i_segment; --i) {
            const float* decays = p.local_decays + (work.i_local + i) * KP<Cfg> + col0 + g;
            const float* local = p.local_states + (work.i_local + i) * LOCAL_STATE<Cfg>;
            const float decay[2] = {decays[0], decays[8]};
            #pragma unroll
            for (int j = 0; j < TILES; ++j) {
                scale_rows(d_state[j], decay);
                if (has_tile(j)) d_state[j] = d_state[j] + load_local(local, local_tile(j));
            }
        }
    }
    // S of the next chunk, on its way while the pairs of one are done.
    FragA<P> state[TILES];
    const u32* image = reinterpret_cast<const u32*>(p.states) +
        ((work.first_chunk + count - 1) * p.h + work.i_h) * IMAGE_WORDS<Cfg>;
    const auto load_state = [&] {
        #pragma unroll
        for (int j = 0; j < TILES; ++j) {
            #pragma unroll
            for (int part = 0; part < P; ++part) {
                Words<4> words = {};
                if (has_tile(j)) ld_global_nc(words, image + image_tile<Cfg>(part, col0, work.v0 + 16 * j));
                #pragma unroll
                for (int e = 0; e < 4; ++e) state[j].at[part][e] = words.at[e];
            }
        }
        image -= p.h * IMAGE_WORDS<Cfg>;
    };
    if (!Cfg::LOCAL && count > 0) load_state();

    float decay[2] = {1.0f, 1.0f};  // of the segment so far, with LOCAL
    #pragma unroll 1
    for (int i = 0; i < count; ++i) {
        cp_async_wait_group<STAGES - 2>();
        __syncthreads();  // tokens of this chunk are there, and the last chunk's and what (5) took are free
        fetch(i + STAGES - 1);
        const Stage& stage = s.stages[i % STAGES];
        const int i_chunk = count - 1 - i, rows = work.chunks.rows(i_chunk);

        const FragA<DECAY_PARTS<Cfg>> w = to_a_transposed(load_decay<Cfg>(stage.w, col0));
        const Acc16 r = load_acc_transposed(stage.r, col0);
        const Acc16 reads = sum_decays(s.sums, w, READS), writes = sum_decays(s.sums, w, WRITES);
        float end[2];
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
            // The first lane of a row has the first token, after which `writes` are.
            const float first = max(to_f32(stage.w.at(0, col0 + g + 8 * e)), LEAST_DECAY);
            end[e] = exp_approx(__shfl_sync(FULL_WARP, writes.at[0][2 * e], 4 * g) + first);
        }
        const Acc16 read = p.scale * exp_approx(reads);
        const FragA<P> r_reads = to_a<P>(r * read);
        if constexpr (Cfg::LOCAL) {
            #pragma unroll
            for (int j = 0; j < TILES; ++j) {
                scale_rows(d_state[j], end);
                mma(d_state[j], r_reads, load_b<P>(stage.d_o, 16 * j));
            }
            decay[0] *= end[0];
            decay[1] *= end[1];
            continue;
        }

        // (4), (10), and what of (8) is S and D
        const Acc16 k = load_acc_transposed(stage.k, col0), write = exp_approx(writes);
        store_a(s.writes, col0, 0, to_a<P>(k * write));
        Acc16 d_scores, x, y;
        zero(d_scores);
        zero(x);
        zero(y);
        float state_sum[2] = {};
        #pragma unroll
        for (int j = 0; j < TILES; ++j) {
            const FragA<P> d_o = load_a<P>(stage.d_o, 16 * j), r_d_state = to_a<P>(d_state[j]);
            const FragB<P> v = load_b_transposed<P>(stage.v, 16 * j);
            mma(d_scores, d_o, v);
            mma(x, state[j], to_b_transposed(d_o));
            mma(y, r_d_state, v);
            store_a(s.d_state, col0, 16 * j, r_d_state);
            const Acc16 product = to_acc(state[j]) * d_state[j];
            #pragma unroll
            for (int n = 0; n < 2; ++n) {
                #pragma unroll
                for (int e = 0; e < 4; ++e) state_sum[e / 2] += product.at[n][e];
            }
            scale_rows(d_state[j], end);
            mma(d_state[j], r_reads, load_b<P>(stage.d_o, 16 * j));
        }
        if (i + 1 < count) load_state();

        // (6) to (8)
        Grads d = {read * x, write * y};
        zero(d.dw);
        add_decay_grad<STATE_GRAD_PARTS>(d.dw, s.sums, r * d.dr, READS);
        add_decay_grad<STATE_GRAD_PARTS>(d.dw, s.sums, k * d.dk, WRITES);
        #pragma unroll
        for (int e = 0; e < 2; ++e) state_sum[e] = group_sum<4>(state_sum[e]) * end[e];
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            #pragma unroll
            for (int e = 0; e < 4; ++e) d.dw.at[n][e] += state_sum[e / 2];
        }
        Acc16 scores;
        zero(scores);
        // Of halves: before the eighth token, and after the seventh.
        const float first = t == 0 ? min(reads.at[1][0], reads.at[1][2]) : 0.0f;
        const float last = t == 3 ? min(writes.at[0][1], writes.at[0][3]) : 0.0f;
        const bool is_wide = __any_sync(FULL_WARP, min(first, last) < -SPAN || has_step(to_b_transposed(w)));
        add_pairs<Cfg>(d, scores, s.sums, w, r, k, d_scores, p.scale, is_wide);
        // The diagonal, (9) too. Token 8 n + 2 t + e of dA is at row 2 t + e of its half, half of that lane's columns.
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            #pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float d_bonus = p.scale * __shfl_sync(FULL_WARP, d_scores.at[n][2 * n + e], 4 * (2 * t + e) + t);
                float bonus = 0.0f;
                #pragma unroll
                for (int i_row = 0; i_row < 2; ++i_row) {
                    const int at = 2 * i_row + e;
                    const float r_x = r.at[n][at], k_x = k.at[n][at];
                    d.dr.at[n][at] += d_bonus * u[i_row] * k_x;
                    d.dk.at[n][at] += d_bonus * u[i_row] * r_x;
                    r_du[i_row] += d_bonus * r_x * k_x;
                    bonus += r_x * k_x * u[i_row];
                }
                bonus = p.scale * strided_sum<4>(bonus);
                scores.at[n][2 * n + e] += g == 2 * t + e ? bonus : 0.0f;
            }
        }
        s.scores[i_warp].put(scores);
        const i64 at = at_k + i_chunk * (CHUNK * i64(stride_k));
        float* partial = p.partial + work.v0 / BV * 3 * p.partial_len + at;
        store_grad<Cfg>(p.dr + at, partial, stride_k, d.dr, col0, rows);
        store_grad<Cfg>(p.dk + at, partial + p.partial_len, stride_k, d.dk, col0, rows);
        store_grad<Cfg>(p.dw + at, partial + 2 * p.partial_len, stride_k, d.dw, col0, rows);
        __syncthreads();  // what (5) takes is there

        #pragma unroll 1
        for (int j = i_warp; j < TILES; j += WARPS) {
            Acc16 dv;
            zero(dv);
            scores = s.scores[0].get();
            #pragma unroll
            for (int i_k = 1; i_k < WARPS; ++i_k) scores = scores + s.scores[i_k].get();
            mma(dv, load_a_transposed<P>(stage.d_o, 16 * j), to_b_transposed(to_a<PAIR_PARTS>(scores)));
            #pragma unroll
            for (int i_k = 0; i_k < KP<Cfg>; i_k += 16) {
                mma(dv, load_a_transposed(s.d_state, i_k, 16 * j), load_b(s.writes, i_k, 0));
            }
            Element* dst = p.dv + at_v + i_chunk * (CHUNK * i64(stride_v));
            store_transposed<V>(dst, stride_v, dv, work.v0 + 16 * j, rows);
        }
    }

    if constexpr (Cfg::LOCAL) {
        float* local = p.local_states + (work.i_local + work.i_segment) * LOCAL_STATE<Cfg>;
        #pragma unroll
        for (int j = 0; j < TILES; ++j) {
            if (has_tile(j)) store_local(local, local_tile(j), d_state[j]);
        }
        float* decays = p.local_decays + (work.i_local + work.i_segment) * KP<Cfg> + col0 + g;
        if (work.v0 == 0 && t == 0) {
            decays[0] = decay[0];
            decays[8] = decay[1];
        }
    } else {
        const float sums[2] = {group_sum<4>(r_du[0]), group_sum<4>(r_du[1])};
        store_du(sums);
        if (p.d_initial_state != nullptr && work.i_segment == 0) {
            for_state([&](i64 i, float& x) { p.d_initial_state[i] = x; });
        }
    }
}

}  // namespace fla::rwkv6
