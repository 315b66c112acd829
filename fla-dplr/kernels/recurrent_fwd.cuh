// recurrent_fwd: one token of the DPLR delta rule on a part of a state in registers.
#pragma once
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/warp.cuh>

namespace fla::dplr {

// The vectors of one token, as far as one lane needs them.
template <class Element, int BK, int COLS>
struct Token {
    Element q[BK], k[BK], a[BK], b[BK], g[BK];
    Element v[COLS];
};

// Equations (1) to (3) of the README: updates the state and returns o before it is scaled, in every lane. With
// KEY_AND_RATE, `x.a` is a key and `x.b` a rate, which stand for a = -key and b = key * rate.
template <int LANES_V, bool KEY_AND_RATE, int BK, int COLS, class Element>
__device__ void recurrent_step(
    float (&r_state)[BK][COLS], float (&r_o)[COLS], const Token<Element, BK, COLS>& x
) {
    // (1)
    float r_r[COLS] = {};
    #pragma unroll
    for (int i = 0; i < BK; ++i) {
        #pragma unroll
        for (int c = 0; c < COLS; ++c) r_r[c] = fmaf(r_state[i][c], to_f32(x.a[i]), r_r[c]);
    }
    #pragma unroll
    for (int c = 0; c < COLS; ++c) r_r[c] = strided_sum<LANES_V>(KEY_AND_RATE ? -r_r[c] : r_r[c]);

    // (2) and (3)
    #pragma unroll
    for (int c = 0; c < COLS; ++c) r_o[c] = 0.0f;
    #pragma unroll
    for (int i = 0; i < BK; ++i) {
        const float decay = exp_approx(to_f32(x.g[i]));
        const float b = KEY_AND_RATE ? to_f32(x.a[i]) * to_f32(x.b[i]) : to_f32(x.b[i]);
        #pragma unroll
        for (int c = 0; c < COLS; ++c) {
            const float added = fmaf(b, r_r[c], to_f32(x.k[i]) * to_f32(x.v[c]));
            r_state[i][c] = fmaf(decay, r_state[i][c], added);
            r_o[c] = fmaf(r_state[i][c], to_f32(x.q[i]), r_o[c]);
        }
    }
    #pragma unroll
    for (int c = 0; c < COLS; ++c) r_o[c] = strided_sum<LANES_V>(r_o[c]);
}

}  // namespace fla::dplr
