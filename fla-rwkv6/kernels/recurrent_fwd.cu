// recurrent_fwd: RWKV-6 token by token, with the state in registers.
//
//   o_t = scale (S + diag(u) k_t v_t^T)^T r_t      (1)  from the state before the token
//   S  <- diag(e^{w_t}) S + k_t v_t^T              (2)
//
// Reference  fla_reference::rwkv6::recurrent_fwd
// Launch     grid ceil(N * H * ceil(V / BV) / WARPS), block 32 * WARPS: a warp owns BV columns of one state
// FLA        fused_recurrent_rwkv6
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>

namespace fla::rwkv6 {

template <class Element, class State>
struct RecurrentFwdParams {
    const Element* r;       // [B, T, H, K]
    const Element* k;       // [B, T, H, K]
    const Element* v;       // [B, T, H, V]
    const Element* w;       // [B, T, H, K]  log decay, natural base, at most 0
    const Element* u;       // [H, K]        bonus of the current token
    const i64* cu_seqlens;  // [N + 1]       null: N dense sequences of t tokens
    Element* o;             // [B, T, H, V]
    States<State> states;   // [.., H, K, V]
    i64 n;
    i64 t;
    i32 h;
    float scale;
};

template <class Cfg>
concept RecurrentFwdConfig = requires {
    typename Cfg::Element;
    typename Cfg::State;
    Cfg::K;          // key channels
    Cfg::V;          // value channels
    Cfg::LANES_V;    // lanes side by side over V, each with 16 bytes of a row of the state; the others lie over K
    Cfg::WARPS;      // warps of a block
    Cfg::ONE_TOKEN;  // every sequence has exactly one token
    Cfg::REVERSE;    // visit the tokens of a sequence from the last to the first
    Cfg::PREFETCH;   // load the next token's vectors into registers while this one's are used
    Cfg::RING;       // tokens whose vectors are in shared memory or under way to it; 0: none
};

// Rows whose bonus a lane forms. Lanes side by side over V have the same rows and share them out, if they come out even.
template <class Cfg>
struct BonusRows {
    using L = Lanes<Cfg>;
    static constexpr bool SHARED = L::BK % L::LANES_V == 0;
    static constexpr int COUNT = SHARED ? L::BK / L::LANES_V : L::BK;
    static constexpr int ACCESS = min(L::K_ACCESS, access_elems<typename Cfg::Element>(COUNT));

    // The first of them.
    __device__ static int first(const L& lanes) {
        return lanes.row0 + (SHARED ? lane_id() % L::LANES_V * COUNT : 0);
    }

    // This lane's part of a vector over K in shared memory.
    template <class T>
    __device__ static void read(T (&x)[COUNT], const T* s_src, const L& lanes) {
        #pragma unroll
        for (int i = 0; i < COUNT; i += ACCESS) {
            const auto piece = *reinterpret_cast<const Vec<T, ACCESS>*>(s_src + first(lanes) + i);
            #pragma unroll
            for (int j = 0; j < ACCESS; ++j) x[i + j] = piece.at[j];
        }
    }

    // The same of one in global memory.
    template <class T>
    __device__ static void load(T (&x)[COUNT], const T* src, const L& lanes) {
        const int row = first(lanes);
        load_masked<ACCESS>(x, src + row, L::BK * L::LANES_K == Cfg::K ? COUNT : Cfg::K - row);
    }
};

// The vectors of one token, as far as one lane needs them; twice of r and k, for the bonus.
template <class Cfg>
struct Token {
    using Element = typename Cfg::Element;
    Element r[Lanes<Cfg>::BK], k[Lanes<Cfg>::BK], w[Lanes<Cfg>::BK];
    Element v[Lanes<Cfg>::COLS];
    Element bonus_r[BonusRows<Cfg>::COUNT], bonus_k[BonusRows<Cfg>::COUNT];
};

// (1) and (2): updates the state and returns what this lane's rows give to o, before the sum over K and the scale.
template <class Cfg>
__device__ void recurrent_step(
    float (&r_state)[Lanes<Cfg>::BK][Lanes<Cfg>::COLS],
    float (&r_o)[Lanes<Cfg>::COLS],
    const Token<Cfg>& x,
    const typename Cfg::Element (&r_u)[BonusRows<Cfg>::COUNT]
) {
    using L = Lanes<Cfg>;
    using Bonus = BonusRows<Cfg>;
    float bonus = 0.0f;  // sum_k r u k over this lane's rows
    #pragma unroll
    for (int i = 0; i < Bonus::COUNT; ++i) {
        bonus = fmaf(to_f32(x.bonus_r[i]) * to_f32(r_u[i]), to_f32(x.bonus_k[i]), bonus);
    }
    if constexpr (Bonus::SHARED) bonus = group_sum<Cfg::LANES_V>(bonus);
    // The bonus joins o before the sum over K, which then is one and not two.
    #pragma unroll
    for (int c = 0; c < L::COLS; ++c) r_o[c] = bonus * to_f32(x.v[c]);
    #pragma unroll
    for (int i = 0; i < L::BK; ++i) {
        const float r = to_f32(x.r[i]), k = to_f32(x.k[i]), decay = exp_approx(to_f32(x.w[i]));
        #pragma unroll
        for (int c = 0; c < L::COLS; ++c) {
            r_o[c] = fmaf(r_state[i][c], r, r_o[c]);                         // (1)
            r_state[i][c] = fmaf(decay, r_state[i][c], k * to_f32(x.v[c]));  // (2)
        }
    }
}

// The sum over K, in every lane. The next token does not wait for it: no state depends on an output.
template <int LANES_V, int COLS>
__device__ void sum_output(float (&r_o)[COLS], float scale) {
    #pragma unroll
    for (int c = 0; c < COLS; ++c) r_o[c] = scale * strided_sum<LANES_V>(r_o[c]);
}

// The vectors of one token in shared memory, of `v` the columns of the block.
template <class Cfg>
struct alignas(16) RingToken {
    typename Cfg::Element r[Cfg::K];
    typename Cfg::Element w[Cfg::K];
    typename Cfg::Element k[Cfg::K];
    typename Cfg::Element v[Cfg::WARPS * Lanes<Cfg>::BV];
};

template <class Cfg>
struct RecurrentFwdShared {
    RingToken<Cfg> ring[max(Cfg::RING, 1)];
};

// Starts the copies of the token in row `row` of [B * T, H, .], for a block whose columns start at `col`.
template <class Cfg>
__device__ void copy_token(
    RingToken<Cfg>& s_token,
    const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p,
    i64 row,
    int col
) {
    using Element = typename Cfg::Element;
    constexpr int K = Cfg::K, BV = Cfg::WARPS * Lanes<Cfg>::BV, COPY = 16 / sizeof(Element);
    static_assert(
        K % COPY == 0 && BV % COPY == 0 && Cfg::V % BV == 0, "vectors in a ring are whole copies of 16 bytes"
    );
    auto* s_dst = reinterpret_cast<Element*>(&s_token);
    #pragma unroll
    for (int first = 0; first < 3 * K + BV; first += 32 * Cfg::WARPS * COPY) {
        const int i = first + threadIdx.x * COPY;
        if (i < 3 * K) {
            const Element* x = i < K ? p.r : i < 2 * K ? p.w : p.k;
            cp_async_cg_16(s_dst + i, x + row * K + i % K, 16);
        } else if (i < 3 * K + BV) {
            cp_async_cg_16(s_dst + i, p.v + row * Cfg::V + col + i - 3 * K, 16);
        }
    }
}

// The threads of the block, which share a ring.
template <class Cfg>
__device__ void sync_block() {
    if constexpr (Cfg::WARPS == 1) {
        __syncwarp();
    } else {
        __syncthreads();
    }
}

// One token and one state for each sequence: both are number `i_nh`, and only the bonus waits for the number of the head.
template <RecurrentFwdConfig Cfg>
__device__ void one_token(
    const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p, const Lanes<Cfg>& lanes, u32 i_nh
) {
    using L = Lanes<Cfg>;
    using Bonus = BonusRows<Cfg>;
    constexpr i64 ELEMS = i64(Cfg::K) * Cfg::V;
    const i64 row = i_nh;
    Token<Cfg> x;
    lanes.load_k(x.r, p.r + row * Cfg::K);
    lanes.load_k(x.w, p.w + row * Cfg::K);
    lanes.load_k(x.k, p.k + row * Cfg::K);
    lanes.load_v(x.v, p.v + row * Cfg::V);
    Bonus::load(x.bonus_r, p.r + row * Cfg::K, lanes);
    Bonus::load(x.bonus_k, p.k + row * Cfg::K, lanes);
    float r_state[L::BK][L::COLS];  // [BK, COLS] of [K, V]
    lanes.load_state(r_state, p.states.initial == nullptr ? nullptr : p.states.initial + row * ELEMS);
    typename Cfg::Element r_u[Bonus::COUNT];
    Bonus::load(r_u, p.u + i64(i_nh % u32(p.h)) * Cfg::K, lanes);

    float r_o[L::COLS];
    recurrent_step<Cfg>(r_state, r_o, x, r_u);
    if (p.states.last != nullptr) lanes.store_state(p.states.last + row * ELEMS, r_state);
    sum_output<Cfg::LANES_V>(r_o, p.scale);
    lanes.store_v(p.o + row * Cfg::V, r_o);
}

template <RecurrentFwdConfig Cfg>
__device__ void recurrent_fwd(const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p) {
    using L = Lanes<Cfg>;
    using Element = typename Cfg::Element;
    using Bonus = BonusRows<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V, RING = Cfg::RING;
    static_assert(
        RING == 0 || (L::BK * L::LANES_K == K && L::SLICES % Cfg::WARPS == 0),
        "with a ring, the lanes of a warp cover all rows and a block is in one state"
    );

    // Slices of one head are neighbours, so that a block reads whole rows of a state.
    const u32 i_slice = blockIdx.x * Cfg::WARPS + threadIdx.x / 32;  // the host keeps it below 2^31
    const u32 i_nh = i_slice / L::SLICES;
    if (Cfg::WARPS > 1 && i64(i_nh) >= p.n * p.h) return;
    const L lanes(i_slice % L::SLICES);
    const int col = L::BV * (blockIdx.x * Cfg::WARPS % L::SLICES);  // first column of the block
    if constexpr (Cfg::ONE_TOKEN) {
        // Short, because one sequence waits for the text of the kernel too.
        if (p.states.slots == nullptr && p.states.tokens == nullptr) [[likely]] {
            one_token<Cfg>(p, lanes, i_nh);
            return;
        }
    }
    const StateHead head = {i_nh / u32(p.h), p.h, i_nh % u32(p.h)};
    const Sequence seq = sequence_of(Cfg::ONE_TOKEN ? nullptr : p.cu_seqlens, head.i_n, p.t);
    const auto row_of = [&](i64 i_t) { return i_t * p.h + head.i_h; };
    const auto visit_of = [&](i64 i_t) { return Cfg::REVERSE ? seq.eos - 1 - i_t : i_t - seq.bos; };

    extern __shared__ __align__(16) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<RecurrentFwdShared<Cfg>*>(s_bytes);
    // Starts the copies of the token that is visited as number `visit`.
    const auto ask = [&](i64 visit) {
        if constexpr (RING > 0) {
            const i64 i_t = Cfg::REVERSE ? seq.eos - 1 - visit : seq.bos + visit;
            copy_token<Cfg>(s.ring[visit % RING], p, row_of(i_t), col);
        }
    };
    #pragma unroll 1
    for (int i = 0; i < RING; ++i) {
        if (i < seq.eos - seq.bos) ask(i);
        cp_async_commit_group();
    }
    Element r_u[Bonus::COUNT];
    Bonus::load(r_u, p.u + head.i_h * K, lanes);

    const auto load = [&](i64 i_t) {
        Token<Cfg> x;
        if constexpr (RING > 0) {
            cp_async_wait_group<RING - 1>();
            sync_block<Cfg>();  // what every thread has copied of this token is visible
            const RingToken<Cfg>& s_x = s.ring[visit_of(i_t) % RING];
            read_shared(x.r, s_x.r + lanes.row0);
            read_shared(x.w, s_x.w + lanes.row0);
            read_shared(x.k, s_x.k + lanes.row0);
            read_shared(x.v, s_x.v + lanes.col0 - col);
            Bonus::read(x.bonus_r, s_x.r, lanes);
            Bonus::read(x.bonus_k, s_x.k, lanes);
        } else {
            lanes.load_k(x.r, p.r + row_of(i_t) * K);
            lanes.load_k(x.w, p.w + row_of(i_t) * K);
            lanes.load_k(x.k, p.k + row_of(i_t) * K);
            lanes.load_v(x.v, p.v + row_of(i_t) * V);
            Bonus::load(x.bonus_r, p.r + row_of(i_t) * K, lanes);
            Bonus::load(x.bonus_k, p.k + row_of(i_t) * K, lanes);
        }
        return x;
    };
    const auto step = [&](float (&r_state)[L::BK][L::COLS], float (&r_o)[L::COLS], const Token<Cfg>& x) {
        recurrent_step<Cfg>(r_state, r_o, x, r_u);
    };
    const auto write = [&](i64 i_t, float (&r_o)[L::COLS]) {
        sum_output<Cfg::LANES_V>(r_o, p.scale);
        lanes.store_v(p.o + row_of(i_t) * V, r_o);
        if constexpr (RING > 0) {
            if (const i64 visit = visit_of(i_t) + RING; visit < seq.eos - seq.bos) {
                sync_block<Cfg>();  // every thread has read the token, and its place in the ring is free
                ask(visit);
            }
            cp_async_commit_group();
        }
    };
    walk_tokens<Cfg, Cfg::REVERSE>(lanes, p.states, head, seq, load, step, write);
}

}  // namespace fla::rwkv6
