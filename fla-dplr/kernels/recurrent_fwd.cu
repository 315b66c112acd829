// recurrent_fwd: the DPLR delta rule token by token, with the state in registers.
//
//   r_t = S^T a_t                                        (1)  from the state before the decay
//   S  <- diag(e^{g_t}) S + b_t r_t^T + k_t v_t^T        (2)
//   o_t = scale S^T q_t                                  (3)
//
// Reference  fla_reference::dplr::recurrent_fwd
// Launch     grid ceil(N * H * ceil(V / BV) / WARPS), block 32 * WARPS: a warp owns BV columns of one state
// FLA        fused_recurrent_dplr_delta_rule
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/states.cuh>
#include <fla/core/token_ring.cuh>
#include <fla/dplr/recurrent_fwd.cuh>

namespace fla::dplr {

template <class Element, class State>
struct RecurrentFwdParams {
    const Element* q;       // [B, T, H, K]
    const Element* k;       // [B, T, H, K]
    const Element* v;       // [B, T, H, V]
    const Element* a;       // [B, T, H, K]  reads the state; or a key
    const Element* b;       // [B, T, H, K]  writes what a has read; or the rate of the key
    const Element* g;       // [B, T, H, K]  log decay, natural base, at most 0
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
    Cfg::K;           // key channels
    Cfg::V;           // value channels
    Cfg::LANES_V;     // lanes side by side over V, each with 16 bytes of a row of the state; the others lie over K
    Cfg::WARPS;       // warps of a block
    Cfg::ONE_TOKEN;   // every sequence has exactly one token
    Cfg::KEY_AND_RATE;  // a is a key and b its rate: the transition is diag(e^g) - (a b) a^T
    Cfg::PREFETCH;    // load the next token's vectors into registers while this one's are used
    Cfg::RING;        // tokens whose vectors are in shared memory or under way to it; 0: none
};

template <class Cfg>
struct RecurrentFwdShared {
    TokenRing<Cfg, 5> ring;  // of a, g, b, k, q and v
};

// One token and one state for each sequence: both are number `i_nh`, and nothing waits for the number of the head.
template <RecurrentFwdConfig Cfg>
__device__ void one_token(
    const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p, const Lanes<Cfg>& lanes, u32 i_nh
) {
    using L = Lanes<Cfg>;
    constexpr i64 ELEMS = i64(Cfg::K) * Cfg::V;
    const i64 row = i_nh;
    // Asked for before the state, which is much larger and would keep it waiting.
    Token<typename Cfg::Element, L::BK, L::COLS> x;
    lanes.load_k(x.a, p.a + row * Cfg::K);
    lanes.load_k(x.g, p.g + row * Cfg::K);
    lanes.load_k(x.b, p.b + row * Cfg::K);
    lanes.load_k(x.k, p.k + row * Cfg::K);
    lanes.load_k(x.q, p.q + row * Cfg::K);
    lanes.load_v(x.v, p.v + row * Cfg::V);
    float r_state[L::BK][L::COLS];  // [BK, COLS] of [K, V]
    lanes.load_state(r_state, p.states.initial == nullptr ? nullptr : p.states.initial + row * ELEMS);

    float r_o[L::COLS];
    recurrent_step<Cfg::LANES_V, Cfg::KEY_AND_RATE>(r_state, r_o, x);
    #pragma unroll
    for (int c = 0; c < L::COLS; ++c) r_o[c] *= p.scale;
    lanes.store_v(p.o + row * Cfg::V, r_o);
    if (p.states.last != nullptr) lanes.store_state(p.states.last + row * ELEMS, r_state);
}

template <RecurrentFwdConfig Cfg>
__device__ void recurrent_fwd(const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p) {
    using L = Lanes<Cfg>;
    using Token = Token<typename Cfg::Element, L::BK, L::COLS>;

    // Slices of one head are neighbours, so that a block reads whole rows of a state.
    const u32 i_slice = blockIdx.x * Cfg::WARPS + threadIdx.x / 32;  // the host keeps it below 2^31
    const u32 i_nh = i_slice / L::SLICES;
    if (Cfg::WARPS > 1 && i64(i_nh) >= p.n * p.h) return;
    const L lanes(i_slice % L::SLICES);
    if constexpr (Cfg::ONE_TOKEN) {
        // Short, because one sequence waits for the text of the kernel too.
        if (p.states.slots == nullptr && p.states.tokens == nullptr) [[likely]] {
            one_token<Cfg>(p, lanes, i_nh);
            return;
        }
    }
    const StateHead head = {i_nh / u32(p.h), p.h, i_nh % u32(p.h)};

    constexpr int RING = Cfg::RING;
    const Sequence seq = sequence_of(Cfg::ONE_TOKEN ? nullptr : p.cu_seqlens, head.i_n, p.t);
    const int col = L::BV * (blockIdx.x * Cfg::WARPS % L::SLICES);  // first column of the block
    const TokenVectors<typename Cfg::Element, 5> vectors = {{p.a, p.g, p.b, p.k, p.q}, p.v};
    extern __shared__ __align__(16) unsigned char s_bytes[];
    auto& ring = reinterpret_cast<RecurrentFwdShared<Cfg>*>(s_bytes)->ring;
    #pragma unroll 1
    for (int i = 0; i < RING; ++i) {
        if (i < seq.eos - seq.bos) ring.ask(i, vectors, (seq.bos + i) * p.h + head.i_h, col);
        cp_async_commit_group();
    }

    const auto load = [&](i64 i_t) {
        const i64 row = i_t * p.h + head.i_h;
        Token x;
        if constexpr (RING > 0) {
            const auto& s_x = ring.wait(i_t - seq.bos);
            read_shared(x.a, s_x.over_k[0] + lanes.row0);
            read_shared(x.g, s_x.over_k[1] + lanes.row0);
            read_shared(x.b, s_x.over_k[2] + lanes.row0);
            read_shared(x.k, s_x.over_k[3] + lanes.row0);
            read_shared(x.q, s_x.over_k[4] + lanes.row0);
            read_shared(x.v, s_x.over_v + lanes.col0 - col);
        } else {
            lanes.load_k(x.a, p.a + row * Cfg::K);
            lanes.load_k(x.g, p.g + row * Cfg::K);
            lanes.load_k(x.b, p.b + row * Cfg::K);
            lanes.load_k(x.k, p.k + row * Cfg::K);
            lanes.load_k(x.q, p.q + row * Cfg::K);
            lanes.load_v(x.v, p.v + row * Cfg::V);
        }
        return x;
    };
    const auto step = [&](float (&r_state)[L::BK][L::COLS], float (&r_o)[L::COLS], const Token& x) {
        recurrent_step<Cfg::LANES_V, Cfg::KEY_AND_RATE>(r_state, r_o, x);
    };
    const auto write = [&](i64 i_t, float (&r_o)[L::COLS]) {
        #pragma unroll
        for (int c = 0; c < L::COLS; ++c) r_o[c] *= p.scale;
        lanes.store_v(p.o + (i_t * p.h + head.i_h) * Cfg::V, r_o);
        if constexpr (RING > 0) {
            if (i_t + RING < seq.eos) {
                ring.sync();  // every thread has read the token, and its slot is free
                ring.ask(i_t - seq.bos, vectors, (i_t + RING) * p.h + head.i_h, col);
            }
            cp_async_commit_group();
        }
    };
    walk_tokens<Cfg>(lanes, p.states, head, seq, load, step, write);
    if constexpr (RING > 0) cp_async_wait_group<0>();  // a sequence that is skipped has not waited for its vectors
}

}  // namespace fla::dplr
