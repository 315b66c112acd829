// recurrent_fwd_sm90: the DPLR delta rule on many states, which stream through shared memory by bulk copies.
//
//   r_t = S^T a_t                                        (1)  from the state before the decay
//   S  <- diag(e^{g_t}) S + b_t r_t^T + k_t v_t^T        (2)
//   o_t = scale S^T q_t                                  (3)
//
// Reference  fla_reference::dplr::recurrent_fwd
// Launch     grid of all multiprocessors, block 32 * WARPS * GROUPS: a group of WARPS warps takes one state after the other
// FLA        fused_recurrent_dplr_delta_rule
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/recurrent_stream.cuh>
#include <fla/core/states.cuh>
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
    const i64* cu_seqlens;  // [N + 1]       null: here every sequence has t tokens
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
    Cfg::K;         // key channels
    Cfg::V;         // value channels
    Cfg::TOKENS;    // most tokens of a sequence
    Cfg::LANES_V;   // lanes side by side over V, each with 16 bytes of a row of the state; the others lie over K
    Cfg::WARPS;     // warps of a group, side by side over V
    Cfg::GROUPS;    // groups of a block
    Cfg::KEY_AND_RATE;  // a is a key and b its rate: the transition is diag(e^g) - (a b) a^T
    Cfg::SLOTS;     // states under way or in use for a group
};

// The vectors of one state's tokens.
template <class Cfg>
struct RecurrentFwdVectors {
    using Element = typename Cfg::Element;
    Element q[Cfg::TOKENS * Cfg::K];  // [TOKENS, K], and so on
    Element k[Cfg::TOKENS * Cfg::K];
    Element a[Cfg::TOKENS * Cfg::K];
    Element b[Cfg::TOKENS * Cfg::K];
    Element g[Cfg::TOKENS * Cfg::K];
    Element v[Cfg::TOKENS * Cfg::V];  // [TOKENS, V]
};

template <class Cfg>
using RecurrentFwdShared = StreamShared<Cfg, RecurrentFwdVectors<Cfg>>;

template <RecurrentFwdConfig Cfg>
__device__ void recurrent_fwd(const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p) {
    using L = Lanes<Cfg>;
    using Token = Token<typename Cfg::Element, L::BK, L::COLS>;
    using Vectors = RecurrentFwdVectors<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V;

    extern __shared__ __align__(128) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<RecurrentFwdShared<Cfg>*>(s_bytes);
    const u32 bytes = u32(p.t) * (5 * K + V) * sizeof(typename Cfg::Element);

    // The row of token number i of state i_nh in [B, T, H, .].
    const auto row_of = [&](u32 i_nh, int i) {
        return (i64(i_nh / u32(p.h)) * p.t + i) * p.h + i_nh % u32(p.h);
    };
    const auto copy = [&](Vectors& s_x, Barrier& full, u32 i_nh) {
        for (int i = 0; i < int(p.t); ++i) {
            const i64 row = row_of(i_nh, i);
            copy_vector(s_x.a + i * K, p.a + row * K, K, full);
            copy_vector(s_x.g + i * K, p.g + row * K, K, full);
            copy_vector(s_x.b + i * K, p.b + row * K, K, full);
            copy_vector(s_x.k + i * K, p.k + row * K, K, full);
            copy_vector(s_x.q + i * K, p.q + row * K, K, full);
            copy_vector(s_x.v + i * V, p.v + row * V, V, full);
        }
    };
    const auto ask = [](u32) { return NoNumbers{}; };
    const auto load = [&](const L& lanes, const Vectors& s_x, NoNumbers, int i) {
        Token x;
        read_shared(x.a, s_x.a + i * K + lanes.row0);
        read_shared(x.g, s_x.g + i * K + lanes.row0);
        read_shared(x.b, s_x.b + i * K + lanes.row0);
        read_shared(x.k, s_x.k + i * K + lanes.row0);
        read_shared(x.q, s_x.q + i * K + lanes.row0);
        read_shared(x.v, s_x.v + i * V + lanes.col0);
        return x;
    };
    const auto step = [&](float (&r_state)[L::BK][L::COLS], float (&r_o)[L::COLS], const Token& x) {
        recurrent_step<Cfg::LANES_V, Cfg::KEY_AND_RATE>(r_state, r_o, x);
    };
    const auto write = [&](const L& lanes, u32 i_nh, int i, float (&r_o)[L::COLS]) {
        #pragma unroll
        for (int c = 0; c < L::COLS; ++c) r_o[c] *= p.scale;
        lanes.store_v(p.o + row_of(i_nh, i) * V, r_o);
    };
    stream_states<Cfg>(s, p.states, {p.n, p.t, p.h}, bytes, copy, ask, load, step, write);
}

}  // namespace fla::dplr
