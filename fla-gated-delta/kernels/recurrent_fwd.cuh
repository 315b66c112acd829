// recurrent_fwd: one token of the gated delta rule on a part of a state in registers.
#pragma once
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/warp.cuh>

namespace fla::gated_delta {

// What is compiled in of the operator.
template <class Cfg>
concept RecurrentFwdOptions = requires {
    Cfg::LOG_GATE;          // g is a log decay
    Cfg::RAW_GATE;          // g is made of logits, a_log and dt_bias
    Cfg::ROW_GATES;         // there is gk
    Cfg::COLUMN_GATES;      // there is gv
    Cfg::HEAD_BETA;         // a strength for each head
    Cfg::CHANNEL_BETA;      // a strength for each value channel
    Cfg::SIGMOID_BETA;      // strengths are logits
    Cfg::TWICE_BETA;        // strengths are doubled after that
    Cfg::NORMALISE_QK;      // q and k are divided by their lengths
};

// Under the root of a squared length, so that a zero vector stays one.
inline constexpr float NORM_EPS = 0x1.0c6f7ap-20f;  // 1e-6

// The vectors of one token, as far as one lane needs them. What the options leave out is never read.
template <class Cfg>
struct Token {
    using L = Lanes<Cfg>;
    using Element = typename Cfg::Element;
    Element q[L::BK], k[L::BK];
    Element v[L::COLS];
    Element beta[L::COLS];
    float gk[L::BK], gv[L::COLS];
};

// The numbers of one token as they lie in memory.
template <class Element>
struct Numbers {
    float g;
    Element logit;
    Element beta;
    float a_log, dt_bias;
};

// What they mean.
struct Gates {
    float decay;  // e^g
    float beta;
};

// e^x for a log decay. Near 1 it is within half a unit in the last place: a slow decay that stays the same is off alike at
// every token, and that adds up.
__device__ inline float exp_decay(float x) { return x > -0.5f ? 1.0f + expm1f(x) : expf(x); }

template <class Cfg>
__device__ float map_beta(float beta) {
    if (!Cfg::SIGMOID_BETA) return beta;
    return Cfg::TWICE_BETA ? 2.0f * sigmoid(beta) : sigmoid(beta);
}

template <class Cfg>
__device__ Gates map_numbers(const Numbers<typename Cfg::Element>& x) {
    float decay = 1.0f, beta = 1.0f;
    if (Cfg::LOG_GATE) decay = exp_decay(x.g);
    if (Cfg::RAW_GATE) decay = exp_decay(-expf(x.a_log) * softplus(to_f32(x.logit) + x.dt_bias));
    if (Cfg::HEAD_BETA) beta = map_beta<Cfg>(to_f32(x.beta));
    return {decay, beta};
}

// Equations (1) to (4) of the README: updates the state and returns o in every lane.
//
// Everything is read from the state in one go, before it changes: with D = e^gk S, the scalar E = e^(g + gv) of a column
// comes out of the sums over K, so that S^T k = E D^T k, and o = scale (E D^T q + (k . q) d).
template <RecurrentFwdOptions Cfg>
__device__ void recurrent_step(
    float (&r_state)[Lanes<Cfg>::BK][Lanes<Cfg>::COLS],
    float (&r_o)[Lanes<Cfg>::COLS],
    const Token<Cfg>& x,
    const Gates& gates,
    float scale
) {
    constexpr int BK = Lanes<Cfg>::BK, COLS = Lanes<Cfg>::COLS, LANES_V = Cfg::LANES_V;
    float r_k[COLS] = {}, r_q[COLS] = {};  // D^T k and D^T q
    float kk = 0.0f, qq = 0.0f, kq = 0.0f;
    #pragma unroll
    for (int i = 0; i < BK; ++i) {
        const float k = to_f32(x.k[i]), q = to_f32(x.q[i]);
        kq = fmaf(k, q, kq);
        if (Cfg::NORMALISE_QK) {
            kk = fmaf(k, k, kk);
            qq = fmaf(q, q, qq);
        }
        const float decay = Cfg::ROW_GATES ? exp_decay(x.gk[i]) : 1.0f;
        #pragma unroll
        for (int c = 0; c < COLS; ++c) {
            if (Cfg::ROW_GATES) r_state[i][c] *= decay;
            r_k[c] = fmaf(r_state[i][c], k, r_k[c]);
            r_q[c] = fmaf(r_state[i][c], q, r_q[c]);
        }
    }
    kq = strided_sum<LANES_V>(kq);
    #pragma unroll
    for (int c = 0; c < COLS; ++c) {
        r_k[c] = strided_sum<LANES_V>(r_k[c]);
        r_q[c] = strided_sum<LANES_V>(r_q[c]);
    }
    float k_scale = 1.0f, q_scale = scale;
    if (Cfg::NORMALISE_QK) {
        k_scale = rsqrtf(strided_sum<LANES_V>(kk) + NORM_EPS);
        q_scale *= rsqrtf(strided_sum<LANES_V>(qq) + NORM_EPS);
    }

    float r_decay[COLS], r_written[COLS];  // E, and d times the length of k
    #pragma unroll
    for (int c = 0; c < COLS; ++c) {
        r_decay[c] = Cfg::COLUMN_GATES ? gates.decay * exp_decay(x.gv[c]) : gates.decay;
        const float beta = Cfg::CHANNEL_BETA ? map_beta<Cfg>(to_f32(x.beta[c])) : gates.beta;
        // (2)
        r_written[c] = k_scale * beta * fmaf(-k_scale * r_decay[c], r_k[c], to_f32(x.v[c]));
        // (4)
        r_o[c] = q_scale * fmaf(r_decay[c], r_q[c], kq * r_written[c]);
    }
    // (1) and (3)
    #pragma unroll
    for (int i = 0; i < BK; ++i) {
        const float k = to_f32(x.k[i]);
        #pragma unroll
        for (int c = 0; c < COLS; ++c) r_state[i][c] = fmaf(r_decay[c], r_state[i][c], k * r_written[c]);
    }
}

}  // namespace fla::gated_delta
