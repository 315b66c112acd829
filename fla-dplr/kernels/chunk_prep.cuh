// chunk_prep: what a chunk's tokens are to the state, made by some warps of a block ahead of those that carry the state.
//
// With G the inclusive cumulative log decay of a chunk of 16 tokens, from its start:
//
//   qq = scale q e^G     aa = a e^{G - g}     kk = k e^{-G}     bb = b e^{-G}                            (1)
//   A_ab = stril(aa bb^T)      A_ak = stril(aa kk^T)    A_qk = tril(qq kk^T)    A_qb = tril(qq bb^T)     (2)
//   T = (I - A_ab)^-1                                                                                    (3)
//
// The chunk reads the state S at its start through qq and aa, adds to it through kk and bb, and leaves it e^{G_15} times that.
// No factor is above e^{-G_15}, and bf16 has the range of f32.
//
// Where a channel of the chunk decays by more than e^-CHUNK_SPAN, or than e^-STEP in a token, all of the chunk takes the
// exact form: factors of writing are e^{G_15 - G}, so that none is above 1, and the state is multiplied by e^{G_15} between
// reading and writing. (2) is then put together of levels: pairs of tokens in the two halves of the chunk, in the
// two halves of a half and so on, each with its reference between the halves, where again no factor is above 1; and the
// diagonal, where there is none. Nothing overflows, and nothing is a difference of larger numbers.
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/blocks.cuh>
#include <fla/core/chunk.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/decay.cuh>
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tile.cuh>
#include <fla/core/tri_inverse.cuh>
#include <fla/core/warp.cuh>

namespace fla::dplr {

inline constexpr int C = CHUNK;  // tokens of a chunk

// Decay of a chunk, in nats, up to which its start will do as the one reference.
inline constexpr float CHUNK_SPAN = 64.0f;

// RWKV-7's bound on the log decay: w = -e^{-1/2} sigmoid(raw).
inline constexpr float RAW_DECAY_SCALE = -0.60653065971263342f;

// The products of (2).
enum Score { QK, QB, AK, AB, NONE };

// Warps that prepare chunks: groups that take turns, each of SCALE_WARPS for (1) and (2) and one that inverts; and one that
// loads for all of them, unless those that invert do.
template <class Cfg>
inline constexpr int GROUP_WARPS = Cfg::SCALE_WARPS + 1;
template <class Cfg>
inline constexpr int PREP_WARPS = Cfg::PREP_GROUPS * GROUP_WARPS<Cfg> + Cfg::LOAD_WARP;

// Whether a group loads a chunk while it works on the one before: if there is room beside those that others work on.
template <class Cfg>
inline constexpr int AHEAD = !Cfg::LOAD_WARP && Cfg::STAGES > 2 * Cfg::PREP_GROUPS ? 1 : 0;

// Chunks whose copies the warp that loads has under way.
template <class Cfg>
inline constexpr int COPIES = max(Cfg::STAGES / 2, 1);

// Named barriers. The block has met at 0 before the warps part, and not after. When a group arrives at FULL, room has been
// waited for of as many chunks after its own as EARLY says, so fewer barriers than stages will do.
template <class Cfg>
inline constexpr int EARLY = Cfg::LOAD_WARP ? COPIES<Cfg> - 1 : AHEAD<Cfg> * Cfg::PREP_GROUPS;
template <class Cfg>
inline constexpr int TURNS = Cfg::STAGES - EARLY<Cfg>;
inline constexpr int LOADED = 0;
template <class Cfg>
inline constexpr int SCALED = LOADED + Cfg::PREP_GROUPS;
template <class Cfg>
inline constexpr int FULL = SCALED<Cfg> + Cfg::PREP_GROUPS;
template <class Cfg>
inline constexpr int EMPTY = FULL<Cfg> + TURNS<Cfg>;

template <class Cfg>
inline constexpr int PARTS = OPERAND_PARTS<typename Cfg::Element>;

// Columns of K in shared memory; those past K are zeros.
template <class Cfg>
inline constexpr int KP = ceil_div(Cfg::K, 16) * 16;

// Calls f(col0) for this warp's slices of 16 key channels, of WARPS that share them.
template <class Cfg, int WARPS, class F>
__device__ void for_slices(int i_warp, F f) {
    if constexpr (KP<Cfg> == 16 * WARPS) {
        f(16 * i_warp);
    } else {
        #pragma unroll 1
        for (int col0 = 16 * i_warp; col0 < KP<Cfg>; col0 += 16 * WARPS) f(col0);
    }
}

// The tokens of a chunk as they come, and what prep makes of them.
template <class Cfg>
struct ChunkStage {
    using Element = typename Cfg::Element;
    TokenTile<Element, KP<Cfg>> q, k, a, b, g;
    TokenTile<Element, Cfg::BV> v;
    BlockTile<PARTS<Cfg>, C, KP<Cfg>> qq, kk, aa, bb;
    BlockTile<PARTS<Cfg>, C, C> ak, qk, qb, t;
    float decay[KP<Cfg>];    // e^{G_15}; in the exact form 1
    float between[KP<Cfg>];  // e^{G_15}, in the exact form
    Words<4> wide;  // whether a channel of this warp asks for the exact form; as many as there are such warps

    __device__ bool is_exact() const {
        const Words<4> all = wide;
        u32 any = 0;
        #pragma unroll
        for (int i = 0; i < Cfg::SCALE_WARPS; ++i) any |= all.at[i];
        return any != 0;
    }
};

// Which log decays a token sums up, as matrices of -1, 0 and 1, for the modes from EXACT on. STARTED sums up as EXACT, but
// for `back`, which is -incl.
struct DecaySums {
    BlockTile<1, C, C> incl[MODES - EXACT];  // from the reference to after the token
    BlockTile<1, C, C> excl[MODES - EXACT];  // from the reference to before the token
    BlockTile<1, C, C> back[MODES - EXACT];  // from after the token to the reference, or with EXACT to the end
    BlockTile<1, C, C> pairs[MODES - LEVEL];  // `is_pair` of q as bits, all or none

    __device__ void init(int mode, int row, int col) {
        const DecaySigns signs(mode, row, col);
        incl[mode - EXACT].set(row, col, signs.incl);
        excl[mode - EXACT].set(row, col, signs.excl);
        back[mode - EXACT].set(row, col, signs.back);
        if (mode >= LEVEL) pairs[mode - LEVEL].set_bits(row, col, is_pair(mode, row, col, true) ? 0xffff : 0);
    }
};

template <class Cfg>
struct ChunkPrep {
    SharedTile<float, C, C> l[Cfg::PREP_GROUPS];  // A_ab with its sign turned
    DecaySums sums;
    const typename Cfg::Element* tokens[5];       // q, k, a, b and g of the first token
};

// All threads of a block call it, before a block barrier. `at` is where the first token's K channels are.
template <class Cfg, class Params>
__device__ void init_prep(ChunkPrep<Cfg>& s, const Params& p, i64 at) {
    if (threadIdx.x == 0) {
        s.tokens[0] = p.q + at;
        s.tokens[1] = p.k + at;
        s.tokens[2] = p.a + at;
        s.tokens[3] = p.b + at;
        s.tokens[4] = p.g + at;
    }
    for (int i = threadIdx.x; i < (MODES - EXACT) * C * C; i += blockDim.x) s.sums.init(EXACT + i / (C * C), i / C % C, i % C);
}

// Parts that hold a log decay: a sum of them must be as good as one in f32.
template <class Cfg>
inline constexpr int DECAY_PARTS =
    same<typename Cfg::Element, float> || Cfg::RAW_DECAY ? 3 : OPERAND_PARTS<typename Cfg::Element>;

// Log decays of a slice of 16 channels as a right operand; 0 for rows past the sequence.
template <class Cfg, class Tile>
__device__ FragB<DECAY_PARTS<Cfg>> load_decay(const Tile& g, int col0, int rows) {
    constexpr int P = DECAY_PARTS<Cfg>;
    if constexpr (!Cfg::RAW_DECAY) {
        return load_b<P>(g, col0);
    } else {
        FragB<P> b;
        for_pairs_down(g, col0, [&](int i, float2 x) {
            const int row = lane_id() % 4 * 2 + i % 2 * 8;
            x.x = row < rows ? RAW_DECAY_SCALE * sigmoid_approx(x.x) : 0.0f;
            x.y = row + 1 < rows ? RAW_DECAY_SCALE * sigmoid_approx(x.y) : 0.0f;
            u32 parts[P];
            split_pair<P>(parts, x.x, x.y);
            #pragma unroll
            for (int p = 0; p < P; ++p) b.at[p][i / 2][i % 2] = parts[p];
        });
        return b;
    }
}

// Log decays of a slice, as `DecaySums` has them.
struct Decays {
    Acc16 incl, excl, back;
};

template <int P>
__device__ Decays sum_decays(const DecaySums& s, const FragB<P>& g, int mode) {
    Decays d;
    const int i = max(mode, int(EXACT)) - EXACT;
    zero(d.incl);
    zero(d.excl);
    zero(d.back);
    mma(d.incl, load_a(s.incl[i], 0, 0), g);
    mma(d.excl, load_a(s.excl[i], 0, 0), g);
    if (mode == STARTED) d.back = -1.0f * d.incl;
    else mma(d.back, load_a(s.back[i], 0, 0), g);
    return d;
}

// (1) for 16 channels. Returns whether the decay is too wide for one reference.
template <class Cfg, class Stage>
__device__ bool scale_slice(Stage& stage, const DecaySums& s_sums, int col0, int rows, float scale, int mode) {
    constexpr int P = PARTS<Cfg>;
    // All loads first: they take longer than what is done with any of them.
    const FragB<DECAY_PARTS<Cfg>> g = load_decay<Cfg>(stage.g, col0, rows);
    Acc16 q = load_acc(stage.q, col0), k = load_acc(stage.k, col0), a = load_acc(stage.a, col0);
    Acc16 b = load_acc(stage.b, col0);
    const Decays d = sum_decays(s_sums, g, mode);
    #pragma unroll
    for (int n = 0; n < 2; ++n) {
        #pragma unroll
        for (int e = 0; e < 4; ++e) {
            const float back = exp_approx(d.back.at[n][e]);
            q.at[n][e] *= scale * exp_approx(d.incl.at[n][e]);
            k.at[n][e] *= back;
            b.at[n][e] *= Cfg::KEY_AND_RATE ? a.at[n][e] * back : back;
            a.at[n][e] *= exp_approx(d.excl.at[n][e]) * (Cfg::KEY_AND_RATE ? -1.0f : 1.0f);
        }
    }
    store_a(stage.qq, 0, col0, to_a<P>(q));
    store_a(stage.kk, 0, col0, to_a<P>(k));
    store_a(stage.aa, 0, col0, to_a<P>(a));
    store_a(stage.bb, 0, col0, to_a<P>(b));

    if (mode >= LEVEL) return false;
    // The last token's G, for the lane's four channels 8 n + 2 t + e at [2 n + e].
    bool is_wide = false;
    float x[4];
    #pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float last = __shfl_sync(FULL_WARP, d.incl.at[i / 2][2 + i % 2], 28 + lane_id() % 4);
        is_wide |= last < -CHUNK_SPAN;
        x[i] = exp_approx(last);
    }
    if (lane_id() < 4) {
        const int col = col0 + 2 * lane_id();
        float* decay = (mode == EXACT ? stage.between : stage.decay) + col;
        *reinterpret_cast<float2*>(decay) = {x[0], x[1]};
        *reinterpret_cast<float2*>(decay + 8) = {x[2], x[3]};
        if (mode == EXACT) {
            *reinterpret_cast<float2*>(stage.decay + col) = {1.0f, 1.0f};
            *reinterpret_cast<float2*>(stage.decay + col + 8) = {1.0f, 1.0f};
        }
    }
    return is_wide || has_step(g);
}

// The product of a tile's rows with the rows of another, over all channels.
template <int P, int COLS>
__device__ Acc16 dot_rows(const BlockTile<P, C, COLS>& a, const BlockTile<P, C, COLS>& b) {
    // Two chains, as one product waits for the one before.
    Acc16 d, other;
    zero(d);
    zero(other);
    #pragma unroll
    for (int k = 0; k < COLS; k += 16) mma(k / 16 % 2 == 0 ? d : other, load_a(a, 0, k), load_b_transposed(b, 0, k));
    return d + other;
}

// Copies what every chunk pass reads of K channels. A loop, as instructions are what there is too much of.
template <class Cfg, class Stage>
__device__ void load_k_tokens(Stage& stage, const ChunkPrep<Cfg>& s, i64 first, i32 stride, int rows) {
    #pragma unroll 1
    for (int i = 0; i < 5; ++i) {
        load_tokens<Cfg::K, 32>((&stage.q)[i], s.tokens[i] + first, stride, rows, Cfg::K, lane_id());
    }
}

// The walk of the warps that prepare. The one that inverts starts the copies of a chunk by `load(stage, i_chunk, rows)`. WAITERS
// warps wait for a chunk at FULL, and CONSUMERS arrive at EMPTY when they are through, if TURNS chunks later there is another;
// each with the chunk's number modulo TURNS.
template <class Cfg, bool REVERSE, int WAITERS, int CONSUMERS, class Stage, class Load>
__device__ void prepare_chunks(
    Stage (&stages)[Cfg::STAGES], ChunkPrep<Cfg>& s, const Chunks& chunks, float scale, Load load
) {
    constexpr int STAGES = Cfg::STAGES, SCALE_WARPS = Cfg::SCALE_WARPS, GROUPS = Cfg::PREP_GROUPS;
    constexpr int P = PARTS<Cfg>;
    static_assert(SCALE_WARPS == 3 || SCALE_WARPS == 4, "three of (2) are theirs");
    static_assert(STAGES % GROUPS == 0 || GROUPS == 1, "a stage is always the same group's");
    const int i_warp = threadIdx.x / 32;
    const auto chunk_at = [&](int i) { return REVERSE ? chunks.count - 1 - i : i; };
    const auto fetch = [&](int i) {
        if (i >= STAGES && i - EARLY<Cfg> < chunks.count) {
            bar_sync(EMPTY<Cfg> + (i - STAGES) % TURNS<Cfg>, 32 * (1 + CONSUMERS));
        }
        if (i < chunks.count) load(stages[i % STAGES], chunk_at(i), chunks.rows(chunk_at(i)));
        cp_async_commit_group();
    };
    if constexpr (Cfg::LOAD_WARP) {
        if (i_warp == PREP_WARPS<Cfg> - 1) {
            #pragma unroll 1
            for (int i = 0; i < COPIES<Cfg>; ++i) fetch(i);
            for (int i = 0; i < chunks.count; ++i) {
                cp_async_wait_group<COPIES<Cfg> - 1>();
                bar_sync(LOADED + i % GROUPS, 32 * GROUP_WARPS<Cfg>);
                fetch(i + COPIES<Cfg>);
            }
            return;
        }
    }
    const int i_group = i_warp / GROUP_WARPS<Cfg>, i_scale = i_warp % GROUP_WARPS<Cfg>;
    const bool inverts = i_scale == SCALE_WARPS, loads = inverts && !Cfg::LOAD_WARP;
    const auto hand_on = [&](int i) {
        cp_async_wait_group<0>();
        if (i < chunks.count) bar_arrive(LOADED + i_group, 32 * GROUP_WARPS<Cfg>);
    };
    // Each of (2) is a warp's.
    const int i_score = inverts ? AB : i_scale < AB ? i_scale : NONE;
    const bool is_q = i_score == QK || i_score == QB, is_k = i_score == QK || i_score == AK;
    auto& s_l = s.l[i_group];
    if (loads) {
        fetch(i_group);
        hand_on(i_group);
        if constexpr (AHEAD<Cfg> > 0) fetch(i_group + GROUPS);
    }
    for (int i = i_group; i < chunks.count; i += GROUPS) {
        Stage& stage = stages[i % STAGES];
        const int rows = chunks.rows(chunk_at(i));
        if (!inverts) bar_sync(LOADED + i_group, 32 * GROUP_WARPS<Cfg>);
        int mode = STARTED;
        Acc16 scores;
        zero(scores);
        while (true) {
            if (!inverts) {
                bool is_wide = false;
                for_slices<Cfg, SCALE_WARPS>(i_scale, [&](int col0) {
                    is_wide |= scale_slice<Cfg>(stage, s.sums, col0, rows, scale, mode);
                });
                if (mode == STARTED) {
                    is_wide = __any_sync(FULL_WARP, is_wide);
                    if (lane_id() == 0) stage.wide.at[i_scale] = is_wide;
                }
            }
            bar_sync(SCALED<Cfg> + i_group, 32 * GROUP_WARPS<Cfg>);
            const bool is_last = mode == EXACT || (mode == STARTED && !stage.is_exact());
            if (i_score != NONE && (mode >= LEVEL || (mode == STARTED && is_last))) {
                // (2)
                Acc16 d = dot_rows(is_q ? stage.qq : stage.aa, is_k ? stage.kk : stage.bb);
                if (mode == STARTED) {
                    for_each(d, [&](int row, int col, float& x) { x = row - int(!is_q) >= col ? x : 0.0f; });
                } else {
                    for_each(d, [&](int row, int col, float& x) { x = is_pair(mode, row, col, is_q) ? x : 0.0f; });
                }
                scores = scores + d;
            }
            if (is_last) break;
            if (mode >= LEVEL) bar_sync(SCALED<Cfg> + i_group, 32 * GROUP_WARPS<Cfg>);  // the operands of the level have been read
            mode = mode == STARTED ? LEVEL : mode == DIAGONAL ? EXACT : mode + 1;
        }
        if (inverts) {
            if constexpr (AHEAD<Cfg> > 0) hand_on(i + GROUPS);
            // (3)
            for_each(scores, [&](int row, int col, float& x) { s_l.at(row, col) = -x; });
            __syncwarp();  // l is complete
            float x[C];
            substitute(x, s_l, 0, lane_id() % 16);
            if (lane_id() < 16) {
                #pragma unroll
                for (int i_row = 0; i_row < C; ++i_row) stage.t.set(i_row, lane_id(), x[i_row]);
            }
            __syncwarp();  // l has been read
        } else if (i_score != NONE) {
            store_a(i_score == AK ? stage.ak : i_score == QK ? stage.qk : stage.qb, 0, 0, to_a<P>(scores));
        }
        bar_arrive(FULL<Cfg> + i % TURNS<Cfg>, 32 * (GROUP_WARPS<Cfg> + WAITERS));
        if (loads) {
            fetch(i + GROUPS + AHEAD<Cfg> * GROUPS);
            if constexpr (AHEAD<Cfg> == 0) hand_on(i + GROUPS);
        }
    }
}

}  // namespace fla::dplr
