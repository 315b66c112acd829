// recurrent_fwd: RWKV-4's exponential average token by token, for decoding: states in place, in pools, after every token.
//
//   o_t = (A + e^{u + k_t} v_t) / (B + e^{u + k_t})      (1)
//   A  <- e^{-e^w} A + e^{k_t} v_t                       (2)
//   B  <- e^{-e^w} B + e^{k_t}                           (3)
//
// Between two tokens the state is what memory holds, so a call of many tokens gives the same bits as many calls. The
// exponent would lose decays that are smaller than its last bit, one token after the other; what its rounding leaves over
// goes into a and b.
//
// Reference  fla_reference::rwkv4::recurrent_fwd
// Launch     grid ceil(N * ceil(C / (32 * COLS)) / WARPS), block 32 * WARPS: a lane is COLS channels of one sequence
// FLA        fused_recurrent_rwkv4
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>
#include <fla/rwkv4/average.cuh>

namespace fla::rwkv4 {

template <class Element, class State>
struct RecurrentFwdParams {
    const float* w;         // [C]  raw decay
    const float* u;         // [C]
    const Element* k;       // [B, T, C]
    const Element* v;       // [B, T, C]
    const i64* cu_seqlens;  // [N + 1]       null: N dense sequences of t tokens
    Element* o;             // [B, T, C]
    States<State> states;   // [.., 3, 1, C]
    i64 n;
    i64 t;
};

template <class Cfg>
concept RecurrentFwdConfig = requires {
    typename Cfg::Element;
    typename Cfg::State;  // float
    Cfg::C;      // channels
    Cfg::COLS;   // channels of a lane, of which C is a multiple
    Cfg::WARPS;  // warps of a block
};

// A state as memory holds it: the exponent e in natural base.
struct Stored {
    float a;
    float b;
    float e;
};

// The least that a rounding of the exponent leaves over and that is worth keeping; where it leaves more, the decay is so
// large that nothing is left of the state anyway.
inline constexpr float MOST_LEFT = 0x1p-10f;

// One token, with the log decay l in natural base: (1), then (2) and (3).
__device__ inline float step(Stored& s, float k, float v, float l, float u) {
    const Weights in_o = weigh((s.e - k - u) * LOG2_E);
    const float denominator = fmaf(in_o.old, s.b, in_o.added);
    const float o = fmaf(in_o.old, s.a, in_o.added * v) * rcp_approx(denominator);

    // e + l is `decayed` and `left` exactly.
    const float decayed = s.e + l;
    const float part = decayed - s.e;
    const float rest = (s.e - (decayed - part)) + (l - part);
    const float left = fminf(fmaxf(rest, -MOST_LEFT), MOST_LEFT);
    const float lead = (decayed - k) + left;
    const bool stays = decayed > k;
    const Weights weight = weigh((stays ? decayed - k : lead) * LOG2_E);
    // e^left, to 2^-30 of itself.
    const float old = stays ? fmaf(left, fmaf(0.5f, left, 1.0f), 1.0f) : weight.old;
    const float added = stays ? weight.added : 1.0f;
    s.a = fmaf(old, s.a, added * v);
    s.b = fmaf(old, s.b, added);
    s.e = stays ? decayed : k;
    return o;
}

template <RecurrentFwdConfig Cfg>
__device__ void recurrent_fwd(const RecurrentFwdParams<typename Cfg::Element, typename Cfg::State>& p) {
    using Element = typename Cfg::Element;
    constexpr int C = Cfg::C, COLS = Cfg::COLS;
    constexpr int SLICES = ceil_div(C, 32 * COLS);
    static_assert(C % COLS == 0, "a lane's channels are there or not there together");

    const u32 i_slice = blockIdx.x * Cfg::WARPS + threadIdx.x / 32;  // the host keeps it below 2^31
    const i64 i_n = i_slice / SLICES;
    if (i_n >= p.n) return;
    const int i_c_or_past = (i_slice % SLICES * 32 + lane_id()) * COLS;
    const bool owns = C % (32 * COLS) == 0 || i_c_or_past < C;
    // Lanes past the last channel repeat the last ones and write nothing.
    const int i_c = min(i_c_or_past, C - COLS);
    const Sequence seq = sequence_of(p.cu_seqlens, i_n, p.t);
    const i64 first = own_first_state(p.states, i_n);

    Vec<Element, COLS> next_k = {}, next_v = {};
    const auto load = [&](i64 i_t) {
        next_k = load_nc<COLS>(p.k + i_t * C + i_c);
        next_v = load_nc<COLS>(p.v + i_t * C + i_c);
    };
    if (first != NO_STATE && seq.bos < seq.eos) load(seq.bos);

    Stored r_state[COLS];
    const float* initial = p.states.initial == nullptr || first == NO_STATE ? nullptr : p.states.initial + first * 3 * C + i_c;
    const auto row = [&](int i) { return initial == nullptr ? Vec<float, COLS>{} : load_stream<COLS>(initial + i * C); };
    const Vec<float, COLS> a = row(0), b = row(1), e = row(2);
    const Vec<float, COLS> w = load_nc<COLS>(p.w + i_c), u = load_nc<COLS>(p.u + i_c);
    float r_l[COLS];
    #pragma unroll
    for (int i = 0; i < COLS; ++i) {
        r_state[i] = {a.at[i], b.at[i], initial == nullptr ? FRESH_EXPONENT : e.at[i]};
        r_l[i] = log_decay(w.at[i]);
    }
    const auto keep = [&](float* states, i64 i_s) {
        Vec<float, COLS> a, b, e;
        #pragma unroll
        for (int i = 0; i < COLS; ++i) {
            a.at[i] = r_state[i].a;
            b.at[i] = r_state[i].b;
            e.at[i] = r_state[i].e;
        }
        float* dst = states + i_s * 3 * C + i_c;
        if (!owns) return;
        store<COLS>(dst, a);
        store<COLS>(dst + C, b);
        store<COLS>(dst + 2 * C, e);
    };

    if (first == NO_STATE) {
        // A sequence whose slot is not to be touched gives zeros.
        #pragma unroll
        for (int i = 0; i < COLS; ++i) r_state[i] = {0.0f, 0.0f, 0.0f};
        Vec<Element, COLS> zero;
        #pragma unroll
        for (int i = 0; i < COLS; ++i) zero.at[i] = from_f32<Element>(0.0f);
        for (i64 i_t = seq.bos; i_t < seq.eos; ++i_t) {
            if (owns) store<COLS>(p.o + i_t * C + i_c, zero);
            if (p.states.tokens != nullptr) keep(p.states.tokens, i_t);
        }
        return;
    }
    for (i64 i_t = seq.bos; i_t < seq.eos; ++i_t) {
        const Vec<Element, COLS> k = next_k, v = next_v;
        if (i_t + 1 < seq.eos) load(i_t + 1);
        Vec<Element, COLS> o;
        #pragma unroll
        for (int i = 0; i < COLS; ++i) {
            o.at[i] = from_f32<Element>(step(r_state[i], to_f32(k.at[i]), to_f32(v.at[i]), r_l[i], u.at[i]));
        }
        if (owns) store<COLS>(p.o + i_t * C + i_c, o);
        if (p.states.tokens != nullptr) keep(p.states.tokens, i_t);
        if (p.states.slots != nullptr) {
            const i64 state = state_after(p.states, i_n, first, i_t - seq.bos, seq.eos - seq.bos);
            if (state != NO_STATE) keep(p.states.last, state);
        }
    }
    if (p.states.last != nullptr && p.states.slots == nullptr) keep(p.states.last, i_n);
}

}  // namespace fla::rwkv4
