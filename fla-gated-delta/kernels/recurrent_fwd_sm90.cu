// recurrent_fwd_sm90: the gated delta rule on many states, which stream through shared memory by bulk copies.
//
//   S  <- diag(e^{g_t + gk_t}) S diag(e^{gv_t})          (1)
//   d_t = beta_t (v_t - S^T k_t)                         (2)  from the decayed state
//   S  <- S + k_t d_t^T                                  (3)
//   o_t = scale S^T q_t                                  (4)
//
// Reference  fla_reference::gated_delta::recurrent_fwd
// Launch     grid of all multiprocessors, block 32 * WARPS * GROUPS: a group of WARPS warps takes one state after the other
// FLA        fused_recurrent_gated_delta_rule
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/recurrent_stream.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>
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
    const i64* cu_seqlens;   // [N + 1]        null: here every sequence has t tokens
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
    Cfg::TOKENS;     // most tokens of a sequence
    Cfg::WARPS;      // warps of a group, side by side over V
    Cfg::GROUPS;     // groups of a block
    Cfg::SLOTS;      // states under way or in use for a group
};

// The vectors of one state's tokens. What the options leave out has room for one copy, and is never read.
template <class Cfg>
struct RecurrentFwdVectors {
    using Element = typename Cfg::Element;
    static constexpr int K_ELEMS = Cfg::TOKENS * Cfg::K, V_ELEMS = Cfg::TOKENS * Cfg::V;
    Element q[K_ELEMS];                                     // [TOKENS, K]
    Element k[K_ELEMS];                                     // [TOKENS, K]
    Element v[V_ELEMS];                                     // [TOKENS, V]
    alignas(16) Element beta[Cfg::CHANNEL_BETA ? V_ELEMS : 1];  // [TOKENS, V]
    alignas(16) float gk[Cfg::ROW_GATES ? K_ELEMS : 1];     // [TOKENS, K]
    alignas(16) float gv[Cfg::COLUMN_GATES ? V_ELEMS : 1];  // [TOKENS, V]
};

template <class Cfg>
using RecurrentFwdShared = StreamShared<Cfg, RecurrentFwdVectors<Cfg>>;

template <RecurrentFwdConfig Cfg>
__device__ void recurrent_fwd(const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p) {
    using L = Lanes<Cfg>;
    using Element = typename Cfg::Element;
    using Vectors = RecurrentFwdVectors<Cfg>;
    constexpr int K = Cfg::K, V = Cfg::V;
    struct Asked {
        Token<Cfg> x;
        Gates gates;
    };
    struct AskedNumbers {
        Numbers<Element> numbers;
        __device__ Gates operator()() const { return map_numbers<Cfg>(numbers); }
    };

    extern __shared__ __align__(128) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<RecurrentFwdShared<Cfg>*>(s_bytes);
    constexpr int TOKEN_BYTES = (2 * K + (Cfg::CHANNEL_BETA ? 2 : 1) * V) * sizeof(Element)
        + ((Cfg::ROW_GATES ? K : 0) + (Cfg::COLUMN_GATES ? V : 0)) * sizeof(float);
    const u32 group = p.hv / p.h;  // value heads that read one query head

    // The row of token number i of state i_nh in [B, T, HV], and in [B, T, H].
    const auto row_of = [&](u32 i_nh, int i) {
        return (i64(i_nh / u32(p.hv)) * p.t + i) * p.hv + i_nh % u32(p.hv);
    };
    const auto qk_row_of = [&](u32 i_nh, int i) {
        return (i64(i_nh / u32(p.hv)) * p.t + i) * p.h + i_nh % u32(p.hv) / group;
    };
    const auto copy = [&](Vectors& s_x, Barrier& full, u32 i_nh) {
        for (int i = 0; i < int(p.t); ++i) {
            const i64 row = row_of(i_nh, i), qk_row = qk_row_of(i_nh, i);
            copy_vector(s_x.k + i * K, p.k + qk_row * K, K, full);
            copy_vector(s_x.q + i * K, p.q + qk_row * K, K, full);
            copy_vector(s_x.v + i * V, p.v + row * V, V, full);
            if (Cfg::ROW_GATES) copy_vector(s_x.gk + i * K, p.gk + row * K, K, full);
            if (Cfg::COLUMN_GATES) copy_vector(s_x.gv + i * V, p.gv + row * V, V, full);
            if (Cfg::CHANNEL_BETA) copy_vector(s_x.beta + i * V, p.beta + row * V, V, full);
        }
    };
    // Lane i has the numbers of token i.
    const auto ask = [&](u32 i_nh) {
        Numbers<Element> numbers = {};
        if (lane_id() < p.t) {
            const i64 row = row_of(i_nh, lane_id());
            const u32 i_hv = i_nh % u32(p.hv);
            if (Cfg::LOG_GATE) numbers.g = p.g[row];
            if (Cfg::RAW_GATE) {
                numbers.logit = p.g_logit[row];
                numbers.a_log = p.a_log[i_hv];
                numbers.dt_bias = p.dt_bias == nullptr ? 0.0f : p.dt_bias[i_hv];
            }
            if (Cfg::HEAD_BETA) numbers.beta = p.beta[row];
        }
        return AskedNumbers{numbers};
    };
    const auto load = [&](const L& lanes, const Vectors& s_x, const Gates& gates, int i) {
        Asked asked;
        asked.gates.decay = __shfl_sync(FULL_WARP, gates.decay, i);
        asked.gates.beta = __shfl_sync(FULL_WARP, gates.beta, i);
        read_shared(asked.x.k, s_x.k + i * K + lanes.row0);
        read_shared(asked.x.q, s_x.q + i * K + lanes.row0);
        if (Cfg::ROW_GATES) read_shared(asked.x.gk, s_x.gk + i * K + lanes.row0);
        read_shared(asked.x.v, s_x.v + i * V + lanes.col0);
        if (Cfg::COLUMN_GATES) read_shared(asked.x.gv, s_x.gv + i * V + lanes.col0);
        if (Cfg::CHANNEL_BETA) read_shared(asked.x.beta, s_x.beta + i * V + lanes.col0);
        return asked;
    };
    const auto step = [&](float (&r_state)[L::BK][L::COLS], float (&r_o)[L::COLS], const Asked& asked) {
        recurrent_step<Cfg>(r_state, r_o, asked.x, asked.gates, p.scale);
    };
    const auto write = [&](const L& lanes, u32 i_nh, int i, float (&r_o)[L::COLS]) {
        lanes.store_v(p.o + row_of(i_nh, i) * V, r_o);
    };
    stream_states<Cfg>(s, p.states, {p.n, p.t, p.hv}, u32(p.t) * TOKEN_BYTES, copy, ask, load, step, write);
}

}  // namespace fla::gated_delta
