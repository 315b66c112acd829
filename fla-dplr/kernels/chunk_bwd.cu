// chunk_bwd: gradients of the DPLR delta rule in chunks of 16 tokens, from the last to the first, on tensor cores.
//
// With the operands of a chunk as `chunk_prep.cuh` makes them, S and u as the forward pass has kept them, and D' the
// gradient of the state after the chunk's updates, as (1) has these in S; states are [V, K]:
//
//   z   = T^T (A_qb^T d_o + bb D'^T)             dv   = A_qk^T d_o + kk D'^T + A_ak^T z                         (7)
//   dA_qk = tril(d_o v^T)   dA_qb = tril(d_o u^T)   dA_ak = stril(z v^T)   dA_ab = stril(z u^T)                (8)
//   dqq = d_o S + dA_qk kk + dA_qb bb            daa  = z S + dA_ak kk + dA_ab bb                              (9)
//   dkk = v D' + dA_qk^T qq + dA_ak^T aa         dbb  = u D' + dA_qb^T qq + dA_ab^T aa                        (10)
//   dS  = D' + d_o^T qq + z^T aa                                                                              (11)
//   dg_t = sum_{i >= t} (qq dqq)_i + sum_{i > t} (aa daa)_i - sum_{j >= t} (kk dkk + bb dbb)_j, pairs within the chunk
//        + sum_{j < t} (kk v D' + bb u D')_j + sum_v S D'                                                     (12)
//
// (12) takes what crosses token t. Pairs of tokens on one side of it are in a row's sum and in a column's, made of the same
// rounded numbers, so that they cancel to the rounding of f32; what comes from or goes to a state is never in a difference.
//
// Three kinds of warps hand chunks on: `prepare_chunks`; those that carry D', STATE_ROWS value channels each, which do (7)
// and (11); and sets of warps that do the rest by turns, a warp 16 key channels at a time, after a set has made (8) together.
//
// Reference  fla_reference::dplr::chunk_bwd
// Launch     a block has BV value channels of one sequence and head, and gradients of one of K_SPLITS parts of K: a warp for
//            every STATE_ROWS of V, GRAD_SETS of GRAD_WARPS, and those that prepare chunks
// FLA        chunk_dplr_delta_rule
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/blocks.cuh>
#include <fla/core/chunk.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/decay.cuh>
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>
#include <fla/dplr/chunk_prep.cuh>
#include <fla/dplr/chunk_state.cuh>

namespace fla::dplr {

template <class Element>
struct ChunkBwdParams {
    const Element* q;            // [B, T, H, K]
    const Element* k;            // [B, T, H, K]
    const Element* v;            // [B, T, H, V]
    const Element* a;            // [B, T, H, K]  reads the state; or a key
    const Element* b;            // [B, T, H, K]  writes what a has read; or the rate of the key
    const Element* g;            // [B, T, H, K]  log decay, natural base, at most 0; or RWKV-7's raw w
    const u16* states;           // [NT, heads, V * (K + C) * PARTS]  `SavedChunk`s
    const Element* d_o;          // [B, T, H, V]
    const float* d_final_state;  // [N, H, K, V]  null: zero
    const i64* cu_seqlens;       // [N + 1]       null: N dense sequences of t tokens
    const i64* chunk_offsets;    // [N + 1]       chunks before each sequence; null: dense
    Element* dq;                 // [B, T, H, K]
    Element* dk;                 // [B, T, H, K]
    Element* dv;                 // [B, T, H, V]
    Element* da;                 // [B, T, H, K]
    Element* db;                 // [B, T, H, K]
    Element* dg;                 // [B, T, H, K]
    float* d_initial_state;      // [N, H, K, V]  null: not wanted
    float* partial;              // [V / BV, 5, B, T, H, K]  of dq, dk, da, db, dg; unused when a block has all of V
    i64 n;
    i64 t;
    i64 partial_len;             // B T H K
    i32 h;
    i32 first_h;  // the launch takes heads first_h .. first_h + heads of every sequence
    i32 heads;
    float scale;
};

template <class Cfg>
concept ChunkBwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;             // key channels
    Cfg::V;             // value channels
    Cfg::BV;            // value channels of a block
    Cfg::STAGES;        // chunks in shared memory
    Cfg::STATE_ROWS;    // value channels of a warp that carries D', a multiple of 16
    Cfg::PREP_GROUPS;   // groups of warps that prepare chunks by turns
    Cfg::SCALE_WARPS;   // warps of a group that make operands: 3 or 4
    Cfg::LOAD_WARP;     // whether loading has a warp of its own
    Cfg::GRAD_SETS;     // sets of warps for gradients, which take chunks by turns
    Cfg::GRAD_WARPS;    // warps of a set: 1, 2 or 4
    Cfg::GRADS;         // gradients of tokens are wanted, and not only that of the state
    Cfg::K_SPLITS;      // blocks that share the gradients over K, each of which carries D'
    Cfg::KEY_AND_RATE;  // a is a key and b its rate: the transition is diag(e^g) - (a b) a^T
    Cfg::RAW_DECAY;     // g is RWKV-7's raw w, and the log decay -e^{-1/2} sigmoid(w)
};

// Named barriers: READY + set, where a set waits for what the warps that carry D' hand it; TAKEN + set, where they wait
// until it has been read; and SCORED + set, of the set alone.
template <class Cfg>
inline constexpr int READY = EMPTY<Cfg> + TURNS<Cfg>;
template <class Cfg>
inline constexpr int TAKEN = READY<Cfg> + Cfg::GRAD_SETS;
template <class Cfg>
inline constexpr int SCORED = TAKEN<Cfg> + Cfg::GRAD_SETS;

// Slices of 16 key channels of a block, and of a warp.
template <class Cfg>
inline constexpr int BLOCK_SLICES = ceil_div(KP<Cfg> / 16, Cfg::K_SPLITS);
template <class Cfg>
inline constexpr int WARP_SLICES = ceil_div(BLOCK_SLICES<Cfg>, Cfg::GRAD_WARPS);

template <class Cfg>
struct ChunkBwdStage : ChunkStage<Cfg> {
    TokenTile<typename Cfg::Element, Cfg::BV> d_o;
    BlockTile<PARTS<Cfg>, Cfg::BV, C> u;  // transposed
};

// What a set is handed.
template <class Cfg>
struct StateGrads {
    BlockTile<PARTS<Cfg>, Cfg::BV, KP<Cfg>> d_state;  // D'
    BlockTile<PARTS<Cfg>, Cfg::BV, C> z;              // transposed
};

// S at 16 key channels.
template <class Cfg>
using StateSlice = BlockTile<PARTS<Cfg>, Cfg::BV, 16>;

// (8), in two parts: what they are multiplied with is rounded once, and dq and dk have no other error.
struct ScoreGrads {
    BlockTile<2, C, C> of[4];
};

template <class Cfg>
struct ChunkBwdShared {
    ChunkBwdStage<Cfg> stages[Cfg::STAGES];
    ChunkPrep<Cfg> prep;
    StateGrads<Cfg> handed[Cfg::GRAD_SETS];
    ScoreGrads d_scores[Cfg::GRAD_SETS][2];                           // by turns
    StateSlice<Cfg> slices[Cfg::GRAD_SETS * Cfg::GRAD_WARPS];
    AccTile aside[Cfg::GRAD_SETS * Cfg::GRAD_WARPS][2];
    ChunkWork<Cfg> work;  // here, as it would take registers from every kind of warp
};

// Where sums over tokens run in a transposed result: row r of a lane, channel g + 8 r, has tokens 2 t, 2 t + 1, and 8 more.

// x[t] = the sum of x[t ..]
__device__ inline void suffix_sum_tokens(Acc16& x) {
    const int t = lane_id() % 4;
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
        float after = 0.0f;
        #pragma unroll
        for (int n = 1; n >= 0; --n) {
            float& x0 = x.at[n][2 * r];
            float& x1 = x.at[n][2 * r + 1];
            float sum = x0 + x1;
            const float one = __shfl_down_sync(FULL_WARP, sum, 1, 4);
            if (t < 3) sum += one;
            const float two = __shfl_down_sync(FULL_WARP, sum, 2, 4);
            if (t < 2) sum += two;
            const float next = __shfl_down_sync(FULL_WARP, sum, 1, 4);
            x1 += (t < 3 ? next : 0.0f) + after;
            x0 += x1;
            after += __shfl_sync(FULL_WARP, sum, 0, 4);
        }
    }
}

// x[t] = the sum of x[.. t], without x[t]
__device__ inline void prefix_sum_tokens(Acc16& x) {
    const int t = lane_id() % 4;
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
        float before = 0.0f;
        #pragma unroll
        for (int n = 0; n < 2; ++n) {
            float& x0 = x.at[n][2 * r];
            float& x1 = x.at[n][2 * r + 1];
            float sum = x0 + x1;
            const float one = __shfl_up_sync(FULL_WARP, sum, 1, 4);
            if (t >= 1) sum += one;
            const float two = __shfl_up_sync(FULL_WARP, sum, 2, 4);
            if (t >= 2) sum += two;
            const float last = __shfl_up_sync(FULL_WARP, sum, 1, 4);
            const float first = x0;
            x0 = (t >= 1 ? last : 0.0f) + before;
            x1 = x0 + first;
            before += __shfl_sync(FULL_WARP, sum, 3, 4);
        }
    }
}

// y[t] += x[t + 1]
__device__ inline void add_next_token(Acc16& y, const Acc16& x) {
    const int t = lane_id() % 4;
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float low = __shfl_down_sync(FULL_WARP, x.at[0][2 * r], 1, 4);
        const float high = __shfl_down_sync(FULL_WARP, x.at[1][2 * r], 1, 4);
        const float eighth = __shfl_sync(FULL_WARP, x.at[1][2 * r], 0, 4);
        y.at[0][2 * r] += x.at[0][2 * r + 1];
        y.at[1][2 * r] += x.at[1][2 * r + 1];
        y.at[0][2 * r + 1] += t < 3 ? low : eighth;
        y.at[1][2 * r + 1] += t < 3 ? high : 0.0f;
    }
}

// The diagonal, row r of a lane at [r].
__device__ inline void diagonal(float (&y)[2], const Acc16& d) {
    const int g = lane_id() / 4;
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
        y[r] = __shfl_sync(FULL_WARP, g % 2 == 0 ? d.at[r][2 * r] : d.at[r][2 * r + 1], 4 * g + g / 2);
    }
}

// Log decays of a slice as one of `DecaySums` has them, transposed.
template <int P>
__device__ Acc16 sum_decay_transposed(const BlockTile<1, C, C>& s, const FragB<P>& g) {
    Acc16 d;
    zero(d);
    mma(d, to_a_transposed(g), load_b_transposed(s, 0, 0));
    return d;
}

// Gradients of 16 channels, [channels, tokens]: of q, a and g by tokens that read, or of k, b and g by tokens that write.
struct SideGrads {
    Acc16 x, y, g;
};

// Adds the pairs within a chunk in the exact form, level by level. A factor is e to a sum of log decays that a matrix has
// picked, so the gradient of the decays is the same matrix's transpose times what the factor's gradient is.
template <bool READS, class Cfg, class Stage>
__device__ void add_pairs(
    SideGrads& d, const Stage& s, const DecaySums& s_sums, const ScoreGrads& s_d, int col0, int rows, float scale
) {
    constexpr int P = PARTS<Cfg>, SUM_PARTS = 3;
    // One after the other, as what is rare must not take registers from the rest.
    const auto factor = [&](const BlockTile<1, C, C>& s_which) {
        return exp_approx(sum_decay_transposed(s_which, load_decay<Cfg>(s.g, col0, rows)));
    };
    #pragma unroll 1
    for (int mode = LEVEL; mode <= DIAGONAL; ++mode) {
        const auto &s_incl = s_sums.incl[mode - EXACT], &s_excl = s_sums.excl[mode - EXACT], &s_back = s_sums.back[mode - EXACT];
        const auto& s_pairs = s_sums.pairs[mode - LEVEL];
        Acc16 x, y;
        zero(x);
        zero(y);
        if constexpr (READS) {
            Acc16 f = factor(s_back);
            FragA<P> operand = to_a<P>(load_acc_transposed(s.k, col0) * f);
            mma(x, operand, load_b_transposed(s_d.of[QK], 0, 0) & load_b_transposed(s_pairs, 0, 0));
            mma(y, operand, load_b_transposed(s_d.of[AK], 0, 0) & load_b_transposed(s_pairs, 0, 0));
            if constexpr (Cfg::KEY_AND_RATE) f = f * load_acc_transposed(s.a, col0);
            operand = to_a<P>(load_acc_transposed(s.b, col0) * f);
            mma(x, operand, load_b_transposed(s_d.of[QB], 0, 0) & load_b_transposed(s_pairs, 0, 0));
            mma(y, operand, load_b_transposed(s_d.of[AB], 0, 0) & load_b_transposed(s_pairs, 0, 0));
            f = scale * factor(s_incl);
            d.x = d.x + f * x;
            operand = to_a<P>(load_acc_transposed(s.q, col0) * f);
            mma(d.g, to_a<SUM_PARTS>(unpacked(operand) * x), load_b(s_incl, 0, 0));
            f = factor(s_excl);
            d.y = d.y + f * y;
            operand = to_a<P>((Cfg::KEY_AND_RATE ? -1.0f : 1.0f) * (load_acc_transposed(s.a, col0) * f));
            mma(d.g, to_a<SUM_PARTS>(unpacked(operand) * y), load_b(s_excl, 0, 0));
        } else {
            FragA<P> operand = to_a<P>(load_acc_transposed(s.q, col0) * (scale * factor(s_incl)));
            mma(x, operand, load_b(s_d.of[QK], 0, 0) & load_b(s_pairs, 0, 0));
            mma(y, operand, load_b(s_d.of[QB], 0, 0) & load_b(s_pairs, 0, 0));
            operand = to_a<P>((Cfg::KEY_AND_RATE ? -1.0f : 1.0f) * (load_acc_transposed(s.a, col0) * factor(s_excl)));
            mma(x, operand, load_b(s_d.of[AK], 0, 0) & load_b(s_pairs, 0, 0));
            mma(y, operand, load_b(s_d.of[AB], 0, 0) & load_b(s_pairs, 0, 0));
            Acc16 f = factor(s_back);
            d.x = d.x + f * x;
            d.y = d.y + f * y;
            operand = to_a<P>(load_acc_transposed(s.k, col0) * f);
            x = unpacked(operand) * x;
            if constexpr (Cfg::KEY_AND_RATE) f = f * load_acc_transposed(s.a, col0);
            operand = to_a<P>(load_acc_transposed(s.b, col0) * f);
            x = x + unpacked(operand) * y;
            mma(d.g, to_a<SUM_PARTS>(x), load_b(s_back, 0, 0));
        }
    }
}

// One gradient of 16 channels, from its transpose: to its tensor, or as this block's part of it.
template <class Cfg, class Element>
__device__ void store_grad(Element* dst, float* partial, i32 stride, Acc16& d, int col0, int rows) {
    if constexpr (Cfg::V > Cfg::BV) {
        for_each(d, [&](int channel, int row, float& x) {
            if (row < rows && col0 + channel < Cfg::K) partial[row * stride + col0 + channel] = x;
        });
    } else {
        store_rows<Cfg::K>(dst, stride, d, col0, rows);
    }
}

// The gradient of RWKV-7's raw w from that of the log decay.
__device__ inline Acc16 decay_of_raw(Acc16 raw, const Acc16& dg) {
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float x = sigmoid_approx(raw.at[n][e]);
            raw.at[n][e] = RAW_DECAY_SCALE * x * (1.0f - x) * dg.at[n][e];
        }
    }
    return raw;
}

// (9), (10) and (12), when (8) is complete. `fetch()` may replace S, and `store(i, grad)` takes the gradients of q, k, a, b
// and g.
template <class Cfg, class Stage, class Fetch, class Store>
__device__ void grads_of_slice(
    const Stage& s, const StateGrads<Cfg>& s_handed, const StateSlice<Cfg>& s_state, const DecaySums& s_sums,
    const ScoreGrads& s_d, AccTile (&s_aside)[2], int col0, int rows, float scale, Fetch fetch, Store store
) {
    constexpr int P = PARTS<Cfg>;
    const bool exact = s.is_exact();
    Acc16 q, a, k, b, product;
    zero(q);
    zero(a);
    zero(k);
    zero(b);
    zero(product);
    #pragma unroll 2
    for (int v = 0; v < Cfg::BV; v += 16) {
        const FragA<P> state = load_a_transposed(s_state, v, 0), d_state = load_a_transposed(s_handed.d_state, v, col0);
        mma(q, state, load_b_transposed<P>(s.d_o, v));
        mma(a, state, load_b(s_handed.z, v, 0));
        mma(k, d_state, load_b_transposed<P>(s.v, v));
        mma(b, d_state, load_b(s.u, v, 0));
        mma(product, state, load_b(s_handed.d_state, v, col0));
    }
    fetch();
    float through[2];
    diagonal(through, product);
    const FragA<P> kk = load_a_transposed(s.kk, 0, col0), bb = load_a_transposed(s.bb, 0, col0);
    // Of (12): what crosses every token by a state, and what is to be summed up over later tokens.
    Acc16 g = unpacked(kk) * k + unpacked(bb) * b, later;
    prefix_sum_tokens(g);
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) {
            g.at[n][e] += through[e / 2] * (exact ? s.between[col0 + lane_id() / 4 + e / 2 * 8] : 1.0f);
        }
    }
    const FragA<P> qq = load_a_transposed(s.qq, 0, col0), aa = load_a_transposed(s.aa, 0, col0);
    if (exact) {
        later = unpacked(qq) * q;
        add_next_token(later, unpacked(aa) * a);
    } else {
        mma<true>(q, kk, load_b_transposed(s_d.of[QK], 0, 0));
        mma<true>(a, kk, load_b_transposed(s_d.of[AK], 0, 0));
        mma<true>(q, bb, load_b_transposed(s_d.of[QB], 0, 0));
        mma<true>(a, bb, load_b_transposed(s_d.of[AB], 0, 0));
        Acc16 k_chunk, b_chunk;
        zero(k_chunk);
        zero(b_chunk);
        mma<true>(k_chunk, qq, load_b(s_d.of[QK], 0, 0));
        mma<true>(b_chunk, qq, load_b(s_d.of[QB], 0, 0));
        mma<true>(k_chunk, aa, load_b(s_d.of[AK], 0, 0));
        mma<true>(b_chunk, aa, load_b(s_d.of[AB], 0, 0));
        later = unpacked(qq) * q + -1.0f * (unpacked(kk) * k_chunk + unpacked(bb) * b_chunk);
        add_next_token(later, unpacked(aa) * a);
        k = k + k_chunk;
        b = b + b_chunk;
    }
    suffix_sum_tokens(later);
    g = g + later;
    const FragB<DECAY_PARTS<Cfg>> decay = load_decay<Cfg>(s.g, col0, rows);
    const Acc16 incl = sum_decay_transposed(s_sums.incl[0], decay);
    const Acc16 back = exp_approx(exact ? sum_decay_transposed(s_sums.back[0], decay) : -1.0f * incl);
    k = back * k;
    b = back * b;
    SideGrads reads{
        scale * exp_approx(incl) * q,
        exp_approx(sum_decay_transposed(s_sums.excl[0], decay)) * a,
        g,
    };
    if (exact) {
        // What is rare must not take registers from the rest.
        s_aside[0].put(k);
        s_aside[1].put(b);
        add_pairs<true, Cfg>(reads, s, s_sums, s_d, col0, rows, scale);
        k = s_aside[0].get();
        b = s_aside[1].get();
    }
    store(0, reads.x);
    if constexpr (!Cfg::KEY_AND_RATE) store(2, reads.y);
    SideGrads writes{k, b, reads.g};
    if constexpr (Cfg::KEY_AND_RATE) s_aside[0].put(reads.y);
    if (exact) add_pairs<false, Cfg>(writes, s, s_sums, s_d, col0, rows, scale);
    store(1, writes.x);
    if constexpr (Cfg::KEY_AND_RATE) {
        // a = -key and b = key * rate
        Acc16 d_key = writes.y * load_acc_transposed(s.b, col0) + -1.0f * s_aside[0].get();
        store(2, d_key);
        writes.y = writes.y * load_acc_transposed(s.a, col0);
    }
    store(3, writes.y);
    if constexpr (Cfg::RAW_DECAY) writes.g = decay_of_raw(load_acc_transposed(s.g, col0), writes.g);
    store(4, writes.g);
}

// One of (8) by a warp. A loop and one text for all four: instructions are what there is too much of.
template <class Cfg, class Stage>
__device__ void score_grad(ScoreGrads& s_d, const Stage& s, const StateGrads<Cfg>& s_handed, int i_score) {
    constexpr int P = PARTS<Cfg>;
    const bool is_q = i_score == QK || i_score == QB, is_k = i_score == QK || i_score == AK;
    Acc16 d;
    zero(d);
    #pragma unroll 1
    for (int v = 0; v < Cfg::BV; v += 16) {
        const FragA<P> a = is_q ? load_a<P>(s.d_o, v) : load_a_transposed(s_handed.z, v, 0);
        mma(d, a, is_k ? load_b_transposed<P>(s.v, v) : load_b(s.u, v, 0));
    }
    for_each(d, [&](int row, int col, float& x) { x = row - int(!is_q) >= col ? x : 0.0f; });
    store_a(s_d.of[i_score], 0, 0, to_a<2>(d));
}

// Starts the copy of a slice of S by a warp; rows past its end become zeros.
template <class Cfg>
__device__ void fetch_slice(StateSlice<Cfg>& s, const SavedChunk<Cfg>& saved, int v0, int i_slice) {
    constexpr int ROWS = ceil_div(Cfg::V, 16);
    #pragma unroll
    for (int p = 0; p < PARTS<Cfg>; ++p) {
        #pragma unroll
        for (int v = 0; v < Cfg::BV / 16; ++v) {
            const bool inside = Cfg::V % Cfg::BV == 0 || v0 / 16 + v < ROWS;
            const u32* src = saved.state.blocks[p][inside ? v0 / 16 + v : 0][i_slice][0];
            cp_async_cg_16(s.blocks[p][v][0][0] + 4 * lane_id(), src + 4 * lane_id(), inside ? 16 : 0);
        }
    }
}

template <ChunkBwdConfig Cfg>
__device__ void chunk_bwd(const ChunkBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using Stage = ChunkBwdStage<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V, BV = Cfg::BV, STAGES = Cfg::STAGES, P = PARTS<Cfg>;
    constexpr int STATE_WARPS = BV / Cfg::STATE_ROWS, M = Cfg::STATE_ROWS / 16;
    constexpr int SETS = Cfg::GRAD_SETS, GRAD_WARPS = Cfg::GRAD_WARPS, CONSUMERS = STATE_WARPS + (Cfg::GRADS ? GRAD_WARPS : 0);
    constexpr int HEAD = PREP_WARPS<Cfg>;
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkBwdShared<Cfg>*>(s_bytes);
    const ChunkWork<Cfg>& work = s.work;
    if (threadIdx.x == 0) s.work = ChunkWork<Cfg>(p, blockIdx.x / Cfg::K_SPLITS);
    __syncthreads();  // work is there
    const int i_split = blockIdx.x % Cfg::K_SPLITS;
    init_prep(s.prep, p, (work.bos * p.h + work.i_h) * Cfg::K);
    __syncthreads();  // prep is ready
    const int i_warp = threadIdx.x / 32;
    const i32 stride_k = p.h * K, stride_v = p.h * V;  // 16 rows of them are less than 2^31 elements
    const Chunks& chunks = work.chunks;
    const auto* saved = reinterpret_cast<const SavedChunk<Cfg>*>(p.states);

    if (i_warp < HEAD) {
        const i64 at_v = (work.bos * p.h + work.i_h) * V + work.v0;
        const auto load = [&](Stage& stage, int i_chunk, int rows) {
            const i64 v0 = at_v + i_chunk * (C * i64(stride_v));
            load_k_tokens(stage, s.prep, i_chunk * (C * i64(stride_k)), stride_k, rows);
            if constexpr (Cfg::GRADS) load_tokens<V, 32>(stage.v, p.v + v0, stride_v, rows, V - work.v0, lane_id());
            load_tokens<V, 32>(stage.d_o, p.d_o + v0, stride_v, rows, V - work.v0, lane_id());
            if constexpr (Cfg::GRADS) load_image<32>(stage.u, saved[work.i_saved + i64(i_chunk) * p.heads].u, work.v0, lane_id());
        };
        prepare_chunks<Cfg, true, STATE_WARPS, CONSUMERS>(s.stages, s.prep, chunks, p.scale, load);
        return;
    }

    if (Cfg::GRADS && i_warp >= HEAD + STATE_WARPS) {
        const int i_grad = i_warp - HEAD - STATE_WARPS, i_set = i_grad / GRAD_WARPS, i_side = i_grad % GRAD_WARPS;
        const int first = i_split * BLOCK_SLICES<Cfg> + i_side, end = min((i_split + 1) * BLOCK_SLICES<Cfg>, KP<Cfg> / 16);
        const auto fetch = [&](int i, int i_slice) {
            if (i < chunks.count && i_slice < end) {
                fetch_slice<Cfg>(s.slices[i_grad], saved[work.i_saved + i64(chunks.count - 1 - i) * p.heads], work.v0, i_slice);
            }
            cp_async_commit_group();
        };
        fetch(i_set, first);
        for (int i = i_set; i < chunks.count; i += SETS) {
            const Stage& stage = s.stages[i % STAGES];
            const StateGrads<Cfg>& handed = s.handed[i % SETS];
            const int i_chunk = chunks.count - 1 - i, rows = chunks.rows(i_chunk);
            const i64 at = ((work.bos + i64(i_chunk) * C) * p.h + work.i_h) * K;
            float* partial = p.partial + work.v0 / BV * 5 * p.partial_len + at;
            bar_sync(READY<Cfg> + i % SETS, 32 * CONSUMERS);
            ScoreGrads& d_scores = s.d_scores[i % SETS][i / SETS % 2];
            #pragma unroll 1
            for (int j = i_side; j < 4; j += GRAD_WARPS) {
                score_grad<Cfg>(d_scores, stage, handed, j);
            }
            bar_sync(SCORED<Cfg> + i % SETS, 32 * GRAD_WARPS);
            #pragma unroll 1
            for (int i_slice = first; i_slice < end; i_slice += GRAD_WARPS) {
                cp_async_wait_group<0>();
                __syncwarp();  // the slice is complete
                const int col0 = 16 * i_slice;
                Element* const grads[5] = {p.dq, p.dk, p.da, p.db, p.dg};
                grads_of_slice<Cfg>(
                    stage, handed, s.slices[i_grad], s.prep.sums, d_scores, s.aside[i_grad], col0, rows, p.scale,
                    [&] {
                        __syncwarp();  // the slice has been read
                        const bool is_last = i_slice + GRAD_WARPS >= end;
                        fetch(is_last ? i + SETS : i, is_last ? first : i_slice + GRAD_WARPS);
                    },
                    [&](int i_grad, Acc16& d) {
                        store_grad<Cfg>(grads[i_grad] + at, partial + i_grad * p.partial_len, stride_k, d, col0, rows);
                    }
                );
            }
            if (i + SETS < chunks.count) bar_arrive(TAKEN<Cfg> + i % SETS, 32 * CONSUMERS);
            if (i + TURNS<Cfg> < chunks.count) bar_arrive(EMPTY<Cfg> + i % TURNS<Cfg>, 32 * (1 + CONSUMERS));
        }
        return;
    }

    // In the tiles, and of the head.
    const int col_v = Cfg::STATE_ROWS * (i_warp - HEAD), v0 = (V > BV ? work.v0 : 0) + col_v;
    const auto at_state = [&] { return (work.i_n * p.h + work.i_h) * K * V; };
    StateRows<Cfg> r_d_state;
    zero<Cfg>(r_d_state);
    if (p.d_final_state != nullptr) {
        for_state<Cfg>(r_d_state, v0, [&](i64 i, float& x) { x = p.d_final_state[at_state() + i]; });
    }
    for (int i = 0; i < chunks.count; ++i) {
        const Stage& stage = s.stages[i % STAGES];
        StateGrads<Cfg>& handed = s.handed[i % SETS];
        bar_sync(FULL<Cfg> + i % TURNS<Cfg>, 32 * (GROUP_WARPS<Cfg> + STATE_WARPS));

        // (7), transposed as all that follows: channels are rows and tokens are columns
        scale_state<Cfg>(r_d_state, stage.decay);
        Acc16 x[M];
        #pragma unroll
        for (int m = 0; m < M; ++m) zero(x[m]);
        #pragma unroll
        for (int j = 0; j < KP<Cfg> / 16; ++j) {
            const FragB<P> bb = load_b_transposed(stage.bb, 0, 16 * j);
            #pragma unroll
            for (int m = 0; m < M; ++m) mma(x[m], to_a<P>(r_d_state[m][j]), bb);
        }
        FragA<P> d_o[M], z[M];
        const FragB<P> qb = load_b(stage.qb, 0, 0), t_over_rows = load_b(stage.t, 0, 0);
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            d_o[m] = load_a_transposed<P>(stage.d_o, col_v + 16 * m);
            mma(x[m], d_o[m], qb);
            const FragA<P> rhs = to_a<P>(x[m]);
            zero(x[m]);
            mma(x[m], rhs, t_over_rows);
            z[m] = to_a<P>(x[m]);
        }
        if (Cfg::GRADS && i >= SETS) bar_sync(TAKEN<Cfg> + i % SETS, 32 * CONSUMERS);
        Acc16 dv[M];
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            if constexpr (Cfg::GRADS) store_a(handed.z, col_v + 16 * m, 0, z[m]);
            zero(dv[m]);
        }
        if constexpr (Cfg::GRADS) {
            #pragma unroll
            for (int j = 0; j < KP<Cfg> / 16; ++j) {
                const FragB<P> kk = load_b_transposed(stage.kk, 0, 16 * j);
                #pragma unroll
                for (int m = 0; m < M; ++m) {
                    const FragA<P> d_state = to_a<P>(r_d_state[m][j]);
                    store_a(handed.d_state, col_v + 16 * m, 16 * j, d_state);
                    mma(dv[m], d_state, kk);
                }
            }
            bar_arrive(READY<Cfg> + i % SETS, 32 * CONSUMERS);
            const FragB<P> qk = load_b(stage.qk, 0, 0), ak = load_b(stage.ak, 0, 0);
            #pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(dv[m], d_o[m], qk);
                mma(dv[m], z[m], ak);
            }
        }

        // (11)
        if (stage.is_exact()) scale_state<Cfg>(r_d_state, stage.between);
        #pragma unroll
        for (int j = 0; j < KP<Cfg> / 16; ++j) {
            const FragB<P> qq = load_b(stage.qq, 0, 16 * j), aa = load_b(stage.aa, 0, 16 * j);
            #pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(r_d_state[m][j], d_o[m], qq);
                mma(r_d_state[m][j], z[m], aa);
            }
        }
        if (i + TURNS<Cfg> < chunks.count) bar_arrive(EMPTY<Cfg> + i % TURNS<Cfg>, 32 * (1 + CONSUMERS));
        if (Cfg::GRADS && (Cfg::K_SPLITS == 1 || i_split == 0)) {
            const int i_chunk = chunks.count - 1 - i;
            Element* dst = p.dv + ((work.bos + i64(i_chunk) * C) * p.h + work.i_h) * V;
            #pragma unroll
            for (int m = 0; m < M; ++m) store_rows<V>(dst, stride_v, dv[m], v0 + 16 * m, chunks.rows(i_chunk));
        }
    }
    if (p.d_initial_state != nullptr && i_split == 0) {
        for_state<Cfg>(r_d_state, v0, [&](i64 i, float& x) { p.d_initial_state[at_state() + i] = x; });
    }
}

}  // namespace fla::dplr
