// recurrent_fwd: the gated delta rule token by token, with the state in registers.
//
//   S  <- diag(e^{g_t + gk_t}) S diag(e^{gv_t})          (1)
//   d_t = beta_t (v_t - S^T k_t)                         (2)  from the decayed state
//   S  <- S + k_t d_t^T                                  (3)
//   o_t = scale S^T q_t                                  (4)
//
// Reference  fla_reference::gated_delta::recurrent_fwd
// Launch     grid ceil(N * HV * ceil(V / BV) / WARPS), block 32 * WARPS: a warp owns BV columns of one state
// FLA        fused_recurrent_gated_delta_rule
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/states.cuh>
#include <fla/gated_delta/recurrent_fwd.cuh>

namespace fla::gated_delta {

template <class Element, class State>
struct RecurrentFwdParams {
    const Element* q;        // [B, T, H, K]
    const Element* k;        // [B, T, H, K]
    const Element* v;        // [B, T, HV, V]
    const float* g;          // [B, T, HV]     log decay, natural base, at most 0
    const Element* g_logit;  // [B, T, HV]     in its place: g = -e^a_log softplus(g_logit + dt_bias)
    const float* a_log;      // [HV]
    const float* dt_bias;    // [HV]           null: zero
    const float* gk;         // [B, T, HV, K]  log decay of rows
    const float* gv;         // [B, T, HV, V]  log decay of columns
    const Element* beta;     // [B, T, HV] or [B, T, HV, V]
    const i64* cu_seqlens;   // [N + 1]        null: N dense sequences of t tokens
    Element* o;              // [B, T, HV, V]
    States<State> states;    // [.., HV, K, V]
    i64 n;
    i64 t;
    i32 h;
    i32 hv;
    float scale;
};

template <class Cfg>
concept RecurrentFwdConfig = RecurrentFwdOptions<Cfg> && requires {
    typename Cfg::Element;
    typename Cfg::State;
    Cfg::K;          // key channels
    Cfg::V;          // value channels
    Cfg::LANES_V;    // lanes side by side over V, each with 16 bytes of a row of the state; the others lie over K
    Cfg::WARPS;      // warps of a block
    Cfg::ONE_TOKEN;  // every sequence has exactly one token
    Cfg::PREFETCH;   // load the next token's vectors while this one's are used
    Cfg::STATES_PASS;  // states leave nothing in the caches
};

// One token and one state for each sequence: both are number `i_nh`, and only what the model learns for a head waits for the
// number of the head.
template <RecurrentFwdConfig Cfg>
__device__ void one_token(
    const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p, const Lanes<Cfg>& lanes, u32 i_nh
) {
    using L = Lanes<Cfg>;
    constexpr i64 ELEMS = i64(Cfg::K) * Cfg::V;
    const i64 row = i_nh;
    const i64 qk_row = p.h == p.hv ? i_nh : i_nh / (u32(p.hv) / u32(p.h));  // of the query head that this value head reads
    // Asked for before the state, which is much larger and would keep it waiting.
    Numbers<typename Cfg::Element> numbers;
    if (Cfg::LOG_GATE) numbers.g = p.g[row];
    if (Cfg::RAW_GATE) {
        const u32 i_h = i_nh % u32(p.hv);
        numbers.logit = p.g_logit[row];
        numbers.a_log = p.a_log[i_h];
        numbers.dt_bias = p.dt_bias == nullptr ? 0.0f : p.dt_bias[i_h];
    }
    if (Cfg::HEAD_BETA) numbers.beta = p.beta[row];
    Token<Cfg> x;
    lanes.load_k(x.k, p.k + qk_row * Cfg::K);
    lanes.load_k(x.q, p.q + qk_row * Cfg::K);
    if (Cfg::ROW_GATES) lanes.load_k(x.gk, p.gk + row * Cfg::K);
    lanes.load_v(x.v, p.v + row * Cfg::V);
    if (Cfg::COLUMN_GATES) lanes.load_v(x.gv, p.gv + row * Cfg::V);
    if (Cfg::CHANNEL_BETA) lanes.load_v(x.beta, p.beta + row * Cfg::V);
    float r_state[L::BK][L::COLS];  // [BK, COLS] of [K, V]
    lanes.load_state(r_state, p.states.initial == nullptr ? nullptr : p.states.initial + row * ELEMS);

    float r_o[L::COLS];
    recurrent_step<Cfg>(r_state, r_o, x, map_numbers<Cfg>(numbers), p.scale);
    lanes.store_v(p.o + row * Cfg::V, r_o);
    if (p.states.last != nullptr) lanes.store_state(p.states.last + row * ELEMS, r_state);
}

template <RecurrentFwdConfig Cfg>
__device__ void recurrent_fwd(const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p) {
    using L = Lanes<Cfg>;
    struct Asked {
        Token<Cfg> x;
        Numbers<typename Cfg::Element> numbers;
    };

    // Slices of one head are neighbours, so that a block reads whole rows of a state.
    const u32 i_slice = blockIdx.x * Cfg::WARPS + threadIdx.x / 32;  // the host keeps it below 2^31
    const u32 i_nh = i_slice / L::SLICES;
    if (Cfg::WARPS > 1 && i64(i_nh) >= p.n * p.hv) return;
    const L lanes(i_slice % L::SLICES);
    if constexpr (Cfg::ONE_TOKEN) {
        // Short, because one sequence waits for the text of the kernel too.
        if (p.states.slots == nullptr && p.states.tokens == nullptr) [[likely]] {
            one_token<Cfg>(p, lanes, i_nh);
            return;
        }
    }
    const StateHead head = {i_nh / u32(p.hv), p.hv, i_nh % u32(p.hv)};
    const i64 i_h = u32(head.i_h) / u32(p.hv / p.h);  // the query head that this value head reads

    const auto load = [&](i64 i_t) {
        const i64 row = i_t * p.hv + head.i_h, qk_row = i_t * p.h + i_h;
        Asked asked;
        if (Cfg::LOG_GATE) asked.numbers.g = p.g[row];
        if (Cfg::RAW_GATE) {
            asked.numbers.logit = p.g_logit[row];
            asked.numbers.a_log = p.a_log[head.i_h];
            asked.numbers.dt_bias = p.dt_bias == nullptr ? 0.0f : p.dt_bias[head.i_h];
        }
        if (Cfg::HEAD_BETA) asked.numbers.beta = p.beta[row];
        lanes.load_k(asked.x.k, p.k + qk_row * Cfg::K);
        lanes.load_k(asked.x.q, p.q + qk_row * Cfg::K);
        if (Cfg::ROW_GATES) lanes.load_k(asked.x.gk, p.gk + row * Cfg::K);
        lanes.load_v(asked.x.v, p.v + row * Cfg::V);
        if (Cfg::COLUMN_GATES) lanes.load_v(asked.x.gv, p.gv + row * Cfg::V);
        if (Cfg::CHANNEL_BETA) lanes.load_v(asked.x.beta, p.beta + row * Cfg::V);
        return asked;
    };
    const auto step = [&](float (&r_state)[L::BK][L::COLS], float (&r_o)[L::COLS], const Asked& asked) {
        recurrent_step<Cfg>(r_state, r_o, asked.x, map_numbers<Cfg>(asked.numbers), p.scale);
    };
    const auto write = [&](i64 i_t, float (&r_o)[L::COLS]) {
        lanes.store_v(p.o + (i_t * p.hv + head.i_h) * Cfg::V, r_o);
    };
    const Sequence seq = Cfg::ONE_TOKEN ? Sequence{head.i_n, head.i_n + 1} : sequence_of(p.cu_seqlens, head.i_n, p.t);
    walk_tokens<Cfg>(lanes, p.states, head, seq, load, step, write);
}

}  // namespace fla::gated_delta
