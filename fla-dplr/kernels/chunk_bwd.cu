// chunk_bwd: gradients of the DPLR delta rule in chunks of 16 tokens, from the last to the first, on tensor cores.
//
// With the operands of a chunk as `chunk_prep.cuh` makes them, S' as the forward pass has kept it, and D' the gradient of
// the state after the chunk's updates, at the chunk's reference; both [V, K]:
//
//   u   = T (aa S'^T + A_ak v)                                                       as in the forward pass     (4)
//   z   = T^T (A_qb^T d_o + bb D'^T)             dv   = A_qk^T d_o + kk D'^T + A_ak^T z                         (7)
//   dA_qk = tril(d_o v^T)   dA_qb = tril(d_o u^T)   dA_ak = stril(z v^T)   dA_ab = stril(z u^T)                (8)
//   dqq = d_o S' + dA_qk kk + dA_qb bb           daa  = z S' + dA_ak kk + dA_ab bb                             (9)
//   dkk = v D' + dA_qk^T qq + dA_ak^T aa         dbb  = u D' + dA_qb^T qq + dA_ab^T aa                        (10)
//   dS' = D' + d_o^T qq + z^T aa                                                                              (11)
//   dg_t = sum_{i >= t} (qq dqq)_i + sum_{i > t} (aa daa)_i - sum_{j >= t} (kk dkk + bb dbb)_j, pairs within the chunk
//        + sum_{j < t} (kk v D' + bb u D')_j + sum_v S' D'                                                     (12)
//
// (12) takes what crosses token t. Pairs of tokens on one side of it are in a row's sum and in a column's, made of the same
// rounded numbers, so that they cancel to the rounding of f32; what comes from or goes to a state is never in a difference.
//
// Three kinds of warps hand chunks on: `prepare_chunks`; those that carry D', STATE_ROWS value channels each, which do (4),
// (7) and (11); and two sides that do the rest, 16 key channels at a time: one does (9) and what of (12) is of tokens that
// read, the other (10) and the rest of (12), after they have made (8) together.
//
// Reference  fla_reference::dplr::chunk_bwd
// Launch     a block has BV value channels of one sequence and head: a warp for every STATE_ROWS of them, twice
//            SIDE_WARPS and those that prepare chunks
// FLA        chunk_dplr_delta_rule
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/blocks.cuh>
#include <fla/core/chunk.cuh>
#include <fla/core/copy.cuh>
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
    const u16* states;           // [NT, H, PARTS, V / 16, K / 16, 4, 8, 8]  S' of every chunk
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
    Cfg::SIDE_WARPS;    // warps for gradients of tokens that read, and as many for those that write: 2 or 4
    Cfg::KEY_AND_RATE;  // a is a key and b its rate: the transition is diag(e^g) - (a b) a^T
    Cfg::RAW_DECAY;     // g is RWKV-7's raw w, and the log decay -e^{-1/2} sigmoid(w)
};

// Parts of (8): what they are multiplied with is rounded once, and dq and dk have no other error.
inline constexpr int D_PARTS = 2;

// Named barriers: of the warps that carry the state and those that do gradients, and of these alone.
template <class Cfg>
inline constexpr int READY = EMPTY<Cfg> + Cfg::STAGES;
template <class Cfg>
inline constexpr int SCORED = READY<Cfg> + Cfg::STAGES;
template <class Cfg>
inline constexpr int READ = SCORED<Cfg> + 1;

// Rows of tokens over value channels that the kernel makes: as tokens come where one part holds them, so that what reads
// both is the same code; otherwise transposed.
template <class Cfg>
using ValueTile =
    If<PARTS<Cfg> == 1, TokenTile<typename Cfg::Element, Cfg::BV>, BlockTile<PARTS<Cfg>, Cfg::BV, C>>;

// 16 channels from their transpose.
__device__ inline void store_value(auto& s, int v0, const auto& x) {
    if constexpr (requires { s.blocks; }) {
        store_a(s, v0, 0, x);
    } else {
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = i / 2 * 8 + lane_id() / 4, col = v0 + i % 2 * 8 + lane_id() % 4 * 2;
            reinterpret_cast<u32&>(s.at(row, col)) = movmatrix_trans(x.at[0][i]);
        }
    }
}

// Channels v0 .. v0 + 16 as a left operand, or their transpose as a right one.
template <int P>
__device__ FragA<P> load_value_a(const auto& s, int v0) {
    if constexpr (requires { s.blocks; }) return load_a_transposed(s, v0, 0);
    else return load_a<P>(s, v0);
}
template <int P>
__device__ FragB<P> load_value_b(const auto& s, int v0) {
    if constexpr (requires { s.blocks; }) return load_b(s, v0, 0);
    else return load_b_transposed<P>(s, v0);
}

template <class Cfg>
struct ChunkBwdStage : ChunkStage<Cfg> {
    TokenTile<typename Cfg::Element, Cfg::BV> d_o;
    BlockTile<PARTS<Cfg>, Cfg::BV, KP<Cfg>> state;    // S'
    BlockTile<PARTS<Cfg>, Cfg::BV, KP<Cfg>> d_state;  // D'
    ValueTile<Cfg> u, z;
};

// (8)
struct ScoreGrads {
    BlockTile<D_PARTS, C, C> of[4];
};

template <class Cfg>
struct ChunkBwdShared {
    ChunkBwdStage<Cfg> stages[Cfg::STAGES];
    ChunkPrep<Cfg> prep;
    ScoreGrads d_scores[2];  // by turns
    AccTile chunk[KP<Cfg> / 16], state[KP<Cfg> / 16];  // of `ReadGrads`, for each slice
    AccTile da[Cfg::KEY_AND_RATE ? KP<Cfg> / 16 : 1];
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

// The log decays of `sum_decays` transposed.
template <int P>
__device__ Decays sum_decays_transposed(const DecaySums& s, const FragB<P>& g, int mode) {
    const FragA<P> g_t = to_a_transposed(g);
    Decays d;
    zero(d.incl);
    zero(d.excl);
    zero(d.back);
    mma(d.incl, g_t, load_b_transposed(s.incl[mode], 0, 0));
    mma(d.excl, g_t, load_b_transposed(s.excl[mode], 0, 0));
    mma(d.back, g_t, load_b_transposed(s.back[mode], 0, 0));
    return d;
}

// Gradients of 16 channels, [channels, tokens]: of q, a and g by tokens that read, or of k, b and g by tokens that write.
struct SideGrads {
    Acc16 x, y, g;
};

// The pairs within a chunk in the exact form, level by level. A factor is e to a sum of log decays that a matrix has
// picked, so the gradient of the decays is the same matrix's transpose times what the factor's gradient is.
template <bool READS, class Cfg, class Stage>
__device__ __noinline__ void levels_of_slice(
    SideGrads& result, const Stage& s, const DecaySums& s_sums, const ScoreGrads& s_d, int col0, int rows, float scale
) {
    constexpr int P = PARTS<Cfg>, SUM_PARTS = 3;
    SideGrads d;
    zero(d.x);
    zero(d.y);
    zero(d.g);
    #pragma unroll 1
    for (int mode = LEVEL; mode <= DIAGONAL; ++mode) {
        const Decays sums = sum_decays_transposed(s_sums, load_decay<Cfg>(s.g, col0, rows), mode);
        const Acc16 back = exp_approx(sums.back), after = scale * exp_approx(sums.incl), before = exp_approx(sums.excl);
        Acc16 factor = back;
        const FragA<P> kk = to_a<P>(load_acc_transposed(s.k, col0) * factor);
        if constexpr (Cfg::KEY_AND_RATE) factor = factor * load_acc_transposed(s.a, col0);
        const FragA<P> bb = to_a<P>(load_acc_transposed(s.b, col0) * factor);
        const FragA<P> qq = to_a<P>(load_acc_transposed(s.q, col0) * after);
        const FragA<P> aa = to_a<P>((Cfg::KEY_AND_RATE ? -1.0f : 1.0f) * (load_acc_transposed(s.a, col0) * before));
        Acc16 x, y;
        zero(x);
        zero(y);
        if constexpr (READS) {
            const FragB<1> pairs = load_b_transposed(s_sums.pairs[mode - LEVEL], 0, 0);
            mma(x, kk, load_b_transposed(s_d.of[QK], 0, 0) & pairs);
            mma(x, bb, load_b_transposed(s_d.of[QB], 0, 0) & pairs);
            mma(y, kk, load_b_transposed(s_d.of[AK], 0, 0) & pairs);
            mma(y, bb, load_b_transposed(s_d.of[AB], 0, 0) & pairs);
            d.x = d.x + after * x;
            d.y = d.y + before * y;
            mma(d.g, to_a<SUM_PARTS>(to_acc(qq) * x), load_b(s_sums.incl[mode], 0, 0));
            mma(d.g, to_a<SUM_PARTS>(to_acc(aa) * y), load_b(s_sums.excl[mode], 0, 0));
        } else {
            const FragB<1> pairs = load_b(s_sums.pairs[mode - LEVEL], 0, 0);
            mma(x, qq, load_b(s_d.of[QK], 0, 0) & pairs);
            mma(x, aa, load_b(s_d.of[AK], 0, 0) & pairs);
            mma(y, qq, load_b(s_d.of[QB], 0, 0) & pairs);
            mma(y, aa, load_b(s_d.of[AB], 0, 0) & pairs);
            d.x = d.x + back * x;
            d.y = d.y + back * y;
            mma(d.g, to_a<SUM_PARTS>(to_acc(kk) * x + to_acc(bb) * y), load_b(s_sums.back[mode], 0, 0));
        }
    }
    result = d;
}

// One gradient of 16 channels, from its transpose: to its tensor, or as this block's part of it.
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

// What tokens that read hand to those that write, which finish (12).
struct ReadGrads {
    Acc16 dq, da;
    Acc16 chunk;  // of (12): what is to be summed over later tokens
    Acc16 state;  // and what is not: sum_v S' D', and pairs in the exact form
};

// (9) and what of (12) is of tokens that read, for 16 key channels. `meet_scored` returns when (8) is complete.
template <class Cfg, class Stage, class Meet>
__device__ ReadGrads read_grads(
    const Stage& s, const DecaySums& s_sums, const ScoreGrads& s_d, int col0, int rows, float scale, bool exact,
    Meet meet_scored
) {
    constexpr int P = PARTS<Cfg>;
    Acc16 x, y, product;
    zero(x);
    zero(y);
    zero(product);
    #pragma unroll 2
    for (int v = 0; v < Cfg::BV; v += 16) {
        const FragA<P> state = load_a_transposed(s.state, v, col0);
        mma(x, state, load_b_transposed<P>(s.d_o, v));
        mma(y, state, load_value_b<P>(s.z, v));
        mma(product, state, load_b(s.d_state, v, col0));
    }
    float through[2];
    diagonal(through, product);
    meet_scored();

    // In memory, and made by a call, so that what is rare takes no registers from the rest.
    SideGrads levels;
    if (exact) {
        levels_of_slice<true, Cfg>(levels, s, s_sums, s_d, col0, rows, scale);
    } else {
        const FragA<P> kk = load_a_transposed(s.kk, 0, col0), bb = load_a_transposed(s.bb, 0, col0);
        mma<true>(x, kk, load_b_transposed(s_d.of[QK], 0, 0));
        mma<true>(y, kk, load_b_transposed(s_d.of[AK], 0, 0));
        mma<true>(x, bb, load_b_transposed(s_d.of[QB], 0, 0));
        mma<true>(y, bb, load_b_transposed(s_d.of[AB], 0, 0));
    }
    const Decays sums = sum_decays_transposed(s_sums, load_decay<Cfg>(s.g, col0, rows), exact ? EXACT : CENTRED);
    ReadGrads d;
    d.chunk = to_acc(load_a_transposed(s.qq, 0, col0)) * x;
    add_next_token(d.chunk, to_acc(load_a_transposed(s.aa, 0, col0)) * y);
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) {
            d.state.at[n][e] = through[e / 2] * (exact ? s.last[col0 + lane_id() / 4 + e / 2 * 8] : 1.0f);
        }
    }
    d.dq = scale * exp_approx(sums.incl) * x;
    d.da = exp_approx(sums.excl) * y;
    if (exact) {
        d.dq = d.dq + levels.x;
        d.da = d.da + levels.y;
        d.state = d.state + levels.g;
    }
    return d;
}

struct WriteGrads {
    Acc16 dk, db;
    Acc16 chunk;  // of (12): what is to be summed over later tokens
    Acc16 state;  // and what is not
};

// (10) and what of (12) is of tokens that write, for 16 key channels.
template <class Cfg, class Stage, class Meet>
__device__ WriteGrads write_grads(
    const Stage& s, const DecaySums& s_sums, const ScoreGrads& s_d, int col0, int rows, float scale, bool exact,
    Meet meet_scored
) {
    constexpr int P = PARTS<Cfg>;
    Acc16 x, y;
    zero(x);
    zero(y);
    #pragma unroll 2
    for (int v = 0; v < Cfg::BV; v += 16) {
        const FragA<P> d_state = load_a_transposed(s.d_state, v, col0);
        mma(x, d_state, load_b_transposed<P>(s.v, v));
        mma(y, d_state, load_value_b<P>(s.u, v));
    }
    WriteGrads d;
    d.state =
        to_acc(load_a_transposed(s.kk, 0, col0)) * x + to_acc(load_a_transposed(s.bb, 0, col0)) * y;
    prefix_sum_tokens(d.state);
    meet_scored();

    SideGrads levels;
    zero(d.chunk);
    if (exact) {
        levels_of_slice<false, Cfg>(levels, s, s_sums, s_d, col0, rows, scale);
    } else {
        const FragA<P> qq = load_a_transposed(s.qq, 0, col0), aa = load_a_transposed(s.aa, 0, col0);
        Acc16 x_chunk, y_chunk;
        zero(x_chunk);
        zero(y_chunk);
        mma<true>(x_chunk, qq, load_b(s_d.of[QK], 0, 0));
        mma<true>(y_chunk, qq, load_b(s_d.of[QB], 0, 0));
        mma<true>(x_chunk, aa, load_b(s_d.of[AK], 0, 0));
        mma<true>(y_chunk, aa, load_b(s_d.of[AB], 0, 0));
        d.chunk = -1.0f * (to_acc(load_a_transposed(s.kk, 0, col0)) * x_chunk +
                           to_acc(load_a_transposed(s.bb, 0, col0)) * y_chunk);
        x = x + x_chunk;
        y = y + y_chunk;
    }
    const Decays decays = sum_decays_transposed(s_sums, load_decay<Cfg>(s.g, col0, rows), exact ? EXACT : CENTRED);
    const Acc16 back = exp_approx(decays.back);
    d.dk = back * x;
    d.db = back * y;
    if (exact) {
        d.dk = d.dk + levels.x;
        d.db = d.db + levels.y;
        d.state = d.state + levels.g;
    }
    return d;
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

// Half of one of (8) by a warp: columns 8 n to 8 n + 8.
template <bool IS_Q, class Cfg, class Stage>
__device__ void score_grad(ScoreGrads& s_d, const Stage& s, int i_score, int n) {
    constexpr int P = PARTS<Cfg>;
    const bool is_k = i_score == QK || i_score == AK;
    float d[2][4] = {};
    #pragma unroll
    for (int v = 0; v < Cfg::BV; v += 16) {
        FragA<P> a;
        if constexpr (IS_Q) a = load_a<P>(s.d_o, v);
        else a = load_value_a<P>(s.z, v);
        u32 b[P][2];
        if constexpr (P == 1) {
            const auto& tile = is_k ? s.v : s.u;
            ldmatrix_x2(b[0], &tile.at(8 * n + lane_id() % 8, lane_id() / 8 % 2 * 8) + v);
        } else {
            const FragB<P> both = is_k ? load_b_transposed<P>(s.v, v) : load_value_b<P>(s.u, v);
            #pragma unroll
            for (int p = 0; p < P; ++p) {
                #pragma unroll
                for (int i = 0; i < 2; ++i) b[p][i] = n == 0 ? both.at[p][0][i] : both.at[p][1][i];
            }
        }
        // Two chains, as one product waits for the one before.
        float (&sum)[4] = d[v / 16 % 2];
        if constexpr (P == 2) {
            mma_m16n8k16_bf16(sum, a.at[1], b[0], sum);
            mma_m16n8k16_bf16(sum, a.at[0], b[1], sum);
        }
        mma_m16n8k16_bf16(sum, a.at[0], b[0], sum);
    }
    const int g = lane_id() / 4, t = lane_id() % 4;
    #pragma unroll
    for (int r = 0; r < 2; ++r) {
        float pair[2];
        #pragma unroll
        for (int e = 0; e < 2; ++e) {
            const int row = g + 8 * r - int(!IS_Q), col = 8 * n + 2 * t + e;
            pair[e] = row >= col ? d[0][2 * r + e] + d[1][2 * r + e] : 0.0f;
        }
        u32 parts[D_PARTS];
        split_pair<D_PARTS>(parts, pair[0], pair[1]);
        #pragma unroll
        for (int p = 0; p < D_PARTS; ++p) s_d.of[i_score].blocks[p][0][0][2 * n + r][lane_id()] = parts[p];
    }
}

template <ChunkBwdConfig Cfg>
__device__ void chunk_bwd(const ChunkBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    using Stage = ChunkBwdStage<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V, BV = Cfg::BV, STAGES = Cfg::STAGES, P = PARTS<Cfg>;
    constexpr int STATE_WARPS = BV / Cfg::STATE_ROWS, M = Cfg::STATE_ROWS / 16;
    constexpr int SIDE_WARPS = Cfg::SIDE_WARPS, GRAD_WARPS = 2 * SIDE_WARPS, CONSUMERS = STATE_WARPS + GRAD_WARPS;
    constexpr int HEAD = PREP_WARPS<Cfg>;
    extern __shared__ __align__(1024) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<ChunkBwdShared<Cfg>*>(s_bytes);
    const ChunkWork<Cfg> work(p);
    init_prep(s.prep, p, (work.bos * p.h + work.i_h) * Cfg::K);
    __syncthreads();  // prep is ready
    const int i_warp = threadIdx.x / 32;
    const i32 stride_k = p.h * K, stride_v = p.h * V;  // 16 rows of them are less than 2^31 elements
    const Chunks& chunks = work.chunks;

    if (i_warp < HEAD) {
        const i64 at_v = (work.bos * p.h + work.i_h) * V + work.v0;
        const auto load = [&](Stage& stage, int i_chunk, int rows, int i_thread) {
            const i64 v0 = at_v + i_chunk * (C * i64(stride_v));
            load_k_tokens(stage, s.prep, i_chunk * (C * i64(stride_k)), stride_k, rows, i_thread);
            load_tokens<V, 32>(stage.v, p.v + v0, stride_v, rows, V - work.v0, i_thread);
            load_tokens<V, 32>(stage.d_o, p.d_o + v0, stride_v, rows, V - work.v0, i_thread);
            const auto& image =
                reinterpret_cast<const StateImage<Cfg>*>(p.states)[(work.first_chunk + i_chunk) * p.h + work.i_h];
            load_image<32>(stage.state, image, work.v0, i_thread);
        };
        prepare_chunks<Cfg, true, STATE_WARPS, CONSUMERS>(s.stages, s.prep, chunks, p.scale, load);
        return;
    }

    if (i_warp >= HEAD + STATE_WARPS) {
        const int i_grad = i_warp - HEAD - STATE_WARPS, i_side = i_grad % SIDE_WARPS;
        const bool reads = i_grad < SIDE_WARPS;
        for (int i = 0; i < chunks.count; ++i) {
            const Stage& stage = s.stages[i % STAGES];
            const int i_chunk = chunks.count - 1 - i, rows = chunks.rows(i_chunk);
            const i64 at = ((work.bos + i64(i_chunk) * C) * p.h + work.i_h) * K;
            float* partial = p.partial + work.v0 / BV * 5 * p.partial_len + at;
            bar_sync(READY<Cfg> + i % STAGES, 32 * CONSUMERS);
            const bool exact = stage.is_exact();
            ScoreGrads& d_scores = s.d_scores[i % 2];
            // Each is met once, with however many slices this warp has.
            bool is_scored = false, is_read = false;
            const auto meet_scored = [&] {
                if (!is_scored) bar_sync(SCORED<Cfg>, 32 * GRAD_WARPS);
                is_scored = true;
            };
            const auto meet_read = [&] {
                if (!is_read) bar_sync(READ<Cfg>, 32 * GRAD_WARPS);
                is_read = true;
            };
            if (reads) {
                #pragma unroll 1
                for (int j = i_side; j < 4; j += SIDE_WARPS) {
                    score_grad<false, Cfg>(d_scores, stage, j / 2 == 0 ? AK : AB, j % 2);
                }
                for_slices<Cfg, SIDE_WARPS>(i_side, [&](int col0) {
                    ReadGrads d =
                        read_grads<Cfg>(stage, s.prep.sums, d_scores, col0, rows, p.scale, exact, meet_scored);
                    s.chunk[col0 / 16].put(d.chunk);
                    s.state[col0 / 16].put(d.state);
                    if constexpr (Cfg::KEY_AND_RATE) s.da[col0 / 16].put(d.da);
                    if constexpr (KP<Cfg> == 16 * SIDE_WARPS) bar_arrive(READ<Cfg>, 32 * GRAD_WARPS);
                    store_grad<Cfg>(p.dq + at, partial, stride_k, d.dq, col0, rows);
                    if constexpr (!Cfg::KEY_AND_RATE) {
                        store_grad<Cfg>(p.da + at, partial + 2 * p.partial_len, stride_k, d.da, col0, rows);
                    }
                });
                meet_scored();
                if constexpr (KP<Cfg> != 16 * SIDE_WARPS) bar_arrive(READ<Cfg>, 32 * GRAD_WARPS);
            } else {
                #pragma unroll 1
                for (int j = i_side; j < 4; j += SIDE_WARPS) {
                    score_grad<true, Cfg>(d_scores, stage, j / 2 == 0 ? QK : QB, j % 2);
                }
                for_slices<Cfg, SIDE_WARPS>(i_side, [&](int col0) {
                    WriteGrads d =
                        write_grads<Cfg>(stage, s.prep.sums, d_scores, col0, rows, p.scale, exact, meet_scored);
                    store_grad<Cfg>(p.dk + at, partial + p.partial_len, stride_k, d.dk, col0, rows);
                    meet_read();
                    // (12)
                    d.chunk = d.chunk + s.chunk[col0 / 16].get();
                    suffix_sum_tokens(d.chunk);
                    Acc16 dg = d.chunk + (d.state + s.state[col0 / 16].get());
                    if constexpr (Cfg::RAW_DECAY) dg = decay_of_raw(load_acc_transposed(stage.g, col0), dg);
                    store_grad<Cfg>(p.dg + at, partial + 4 * p.partial_len, stride_k, dg, col0, rows);
                    if constexpr (Cfg::KEY_AND_RATE) {
                        // a = -key and b = key * rate
                        Acc16 d_key = d.db * load_acc_transposed(stage.b, col0) + -1.0f * s.da[col0 / 16].get();
                        store_grad<Cfg>(p.da + at, partial + 2 * p.partial_len, stride_k, d_key, col0, rows);
                        d.db = d.db * load_acc_transposed(stage.a, col0);
                    }
                    store_grad<Cfg>(p.db + at, partial + 3 * p.partial_len, stride_k, d.db, col0, rows);
                });
                meet_scored();
                meet_read();
            }
            if (i + STAGES < chunks.count) bar_arrive(EMPTY<Cfg> + i % STAGES, 32 * (1 + CONSUMERS));
        }
        return;
    }

    // In the tiles, and of the head.
    const int col_v = Cfg::STATE_ROWS * (i_warp - HEAD), v0 = work.v0 + col_v;
    const i64 at_state = (work.i_n * p.h + work.i_h) * K * V;
    StateRows<Cfg> r_d_state;
    zero<Cfg>(r_d_state);
    if (p.d_final_state != nullptr) {
        for_state<Cfg>(r_d_state, v0, [&](i64 i, float& x) { x = p.d_final_state[at_state + i]; });
    }
    Element* dv_chunk = p.dv + ((work.bos + i64(chunks.count - 1) * C) * p.h + work.i_h) * V;
    for (int i = 0; i < chunks.count; ++i) {
        Stage& stage = s.stages[i % STAGES];
        bar_sync(FULL<Cfg> + i % STAGES, 32 * (1 + Cfg::SCALE_WARPS + STATE_WARPS));

        // (4), transposed as all that follows: channels are rows and tokens are columns
        Acc16 x[M], y[M];
        #pragma unroll
        for (int m = 0; m < M; ++m) zero(x[m]);
        #pragma unroll
        for (int j = 0; j < KP<Cfg>; j += 16) {
            const FragB<P> aa = load_b_transposed(stage.aa, 0, j);
            #pragma unroll
            for (int m = 0; m < M; ++m) mma(x[m], load_a(stage.state, col_v + 16 * m, j), aa);
        }
        const FragB<P> ak = load_b_transposed(stage.ak, 0, 0), t = load_b_transposed(stage.t, 0, 0);
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            mma(x[m], load_a_transposed<P>(stage.v, col_v + 16 * m), ak);
            zero(y[m]);
            mma(y[m], to_a<P>(x[m]), t);
            store_value(stage.u, col_v + 16 * m, to_a<P>(y[m]));
            zero(x[m]);
        }

        // (7)
        scale_state<Cfg>(r_d_state, stage.scale);
        #pragma unroll
        for (int j = 0; j < KP<Cfg> / 16; ++j) {
            const FragB<P> bb = load_b_transposed(stage.bb, 0, 16 * j);
            #pragma unroll
            for (int m = 0; m < M; ++m) {
                const FragA<P> d_state = to_a<P>(r_d_state[m][j]);
                store_a(stage.d_state, col_v + 16 * m, 16 * j, d_state);
                mma(x[m], d_state, bb);
            }
        }
        FragA<P> d_o[M], z[M];
        const FragB<P> qb = load_b(stage.qb, 0, 0), t_over_rows = load_b(stage.t, 0, 0);
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            d_o[m] = load_a_transposed<P>(stage.d_o, col_v + 16 * m);
            mma(x[m], d_o[m], qb);
            zero(y[m]);
            mma(y[m], to_a<P>(x[m]), t_over_rows);
            z[m] = to_a<P>(y[m]);
            store_value(stage.z, col_v + 16 * m, z[m]);
        }
        bar_arrive(READY<Cfg> + i % STAGES, 32 * CONSUMERS);

        // (11)
        const bool exact = stage.is_exact();
        if (exact) scale_state<Cfg>(r_d_state, stage.last);
        #pragma unroll
        for (int j = 0; j < KP<Cfg> / 16; ++j) {
            const FragB<P> qq = load_b(stage.qq, 0, 16 * j), aa = load_b(stage.aa, 0, 16 * j);
            #pragma unroll
            for (int m = 0; m < M; ++m) {
                mma(r_d_state[m][j], d_o[m], qq);
                mma(r_d_state[m][j], z[m], aa);
            }
        }
        const FragB<P> qk = load_b(stage.qk, 0, 0), ak_over_rows = load_b(stage.ak, 0, 0);
        Acc16 dv[M];
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            zero(dv[m]);
            mma(dv[m], d_o[m], qk);
            mma(dv[m], z[m], ak_over_rows);
        }
        #pragma unroll
        for (int j = 0; j < KP<Cfg>; j += 16) {
            const FragB<P> kk = load_b_transposed(stage.kk, 0, j);
            #pragma unroll
            for (int m = 0; m < M; ++m) mma(dv[m], load_a(stage.d_state, col_v + 16 * m, j), kk);
        }
        if (!exact) scale_state<Cfg>(r_d_state, stage.last);
        if (i + STAGES < chunks.count) bar_arrive(EMPTY<Cfg> + i % STAGES, 32 * (1 + CONSUMERS));
        #pragma unroll
        for (int m = 0; m < M; ++m) {
            store_transposed<V>(dv_chunk, stride_v, dv[m], v0 + 16 * m, chunks.rows(chunks.count - 1 - i));
        }
        dv_chunk -= C * i64(stride_v);
    }
    if (p.d_initial_state != nullptr) {
        for_state<Cfg>(r_d_state, v0, [&](i64 i, float& x) { p.d_initial_state[at_state + i] = x; });
    }
}

}  // namespace fla::dplr
