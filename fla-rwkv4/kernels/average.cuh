// average: the running average of one channel, and what a token does to it.
//
// Exponents are to base 2. The sums are a 2^e and b 2^e, and e is the exponent q of the token that set it n tokens ago,
// with the decays since: e = q + n l. Adding l token by token would lose decays that are smaller than the last bit of e,
// one token after the other. A difference of exponents is taken of q and the key first, which is exact where it matters,
// and only then of the decays.
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>

namespace fla::rwkv4 {

// Tokens between two saved states. The host has the same number.
inline constexpr int CHUNK = 16;

// The exponent, natural base, of a state that has seen nothing: finite, and below every key.
inline constexpr float FRESH_EXPONENT = -1e38f;

// An exponent, base 2, whose weight beside any key is 0.
inline constexpr float NO_EXPONENT = -0x1p+127f;

// Larger decays leave nothing of anything either, and their multiples stay finite.
inline constexpr float MAX_DECAY = 0x1p+90f;

// The log decay -e^w, natural base; its derivative in w is itself.
__device__ inline float log_decay(float w) { return -fminf(expf(w), MAX_DECAY); }

// The state of one channel.
struct Average {
    float a;  // numerator
    float b;  // denominator
    float q;  // exponent, n tokens ago
    float n;  // 0 when the last token set it

    // The exponent after the last token, for the log decay l2.
    __device__ float exponent(float l2) const { return fmaf(n, l2, q); }
};

// Sums over a run of tokens by themselves.
struct Sums {
    float a;
    float b;
    float e;  // exponent after the last
};

// What is left of two sums when both get the larger exponent: one of the factors is 1, and one exponential does.
struct Weights {
    float old;
    float added;
};

// `lead` is how far the exponent of the old sums is above that of the added ones. These win a tie.
__device__ inline Weights weigh(float lead) {
    const float less = exp2_approx(-fabsf(lead));
    return lead > 0.0f ? Weights{1.0f, less} : Weights{less, 1.0f};
}

// Takes over sums `x` of `steps` tokens: (2) and (3) of the README.
__device__ inline void absorb(Average& s, const Sums& x, float steps, float l2) {
    const float n = s.n + steps;
    const float lead = fmaf(n, l2, s.q - x.e);
    const Weights weight = weigh(lead);
    s.a = fmaf(weight.old, s.a, weight.added * x.a);
    s.b = fmaf(weight.old, s.b, weight.added * x.b);
    s.q = lead > 0.0f ? s.q : x.e;
    s.n = lead > 0.0f ? n : 0.0f;
}

// The output of a token from the state before it: (1).
__device__ inline float read(const Average& s, float k2, float v, float l2, float u2) {
    const Weights weight = weigh(fmaf(s.n, l2, s.q - k2 - u2));
    const float denominator = fmaf(weight.old, s.b, weight.added);
    return fmaf(weight.old, s.a, weight.added * v) * rcp_approx(denominator);
}

// Exponents of `rows` of the STEPS tokens after the last of them, and the largest; without meaning when there are none.
template <int STEPS>
__device__ float token_exponents(float (&e)[STEPS], const float (&k2)[STEPS], int rows, float l2) {
    if (rows == STEPS) {
        #pragma unroll
        for (int i_r = 0; i_r < STEPS; ++i_r) e[i_r] = fmaf(float(STEPS - 1 - i_r), l2, k2[i_r]);
    } else {
        #pragma unroll
        for (int i_r = 0; i_r < STEPS; ++i_r) {
            e[i_r] = i_r < rows ? fmaf(float(rows - 1 - i_r), l2, k2[i_r]) : NO_EXPONENT;
        }
    }
    float most = NO_EXPONENT;
    #pragma unroll
    for (int i_r = 0; i_r < STEPS; ++i_r) most = fmaxf(most, e[i_r]);
    return most;
}

// Weights of tokens are kept times 2^HEADROOM, so that a small one beside a large one is not flushed to 0 so soon.
inline constexpr float HEADROOM = 60.0f;
inline constexpr float NO_HEADROOM = 0x1p-60f;

// Weights of tokens with exponents `e`, as multiples of 2^(top - HEADROOM). `e` and `weights` may be the same.
template <int STEPS>
__device__ void token_weights(float (&weights)[STEPS], const float (&e)[STEPS], float top) {
    const float base = top - HEADROOM;
    #pragma unroll
    for (int i_r = 0; i_r < STEPS; ++i_r) weights[i_r] = exp2_approx(e[i_r] - base);
}

// Sums of tokens with these values and weights, whose largest exponent is `e`.
template <int STEPS>
__device__ Sums sum_tokens(const float (&weights)[STEPS], const float (&v)[STEPS], float e) {
    Sums x = {0.0f, 0.0f, e};
    #pragma unroll
    for (int i_r = 0; i_r < STEPS; ++i_r) {
        x.a = fmaf(weights[i_r], v[i_r], x.a);
        x.b += weights[i_r];
    }
    x.a *= NO_HEADROOM;
    x.b *= NO_HEADROOM;
    return x;
}

// One frame for a whole run of STEPS tokens: every weight as it is after the last token, as a multiple of the largest, times
// 2^HEADROOM. Sums in a frame are not rescaled, so a token costs one exponential and one reciprocal. It serves unless a
// denominator is so far below what comes later in the run that its terms would be lost.
struct Frame {
    float old;    // weight of the state before the run
    float top;    // the largest exponent
    float bonus;  // e^{u + l}: of a token in its own output, beside what it adds to the state
    bool serves;

    static constexpr float MOST_BONUS = 40.0f;
    static constexpr float LEAST = 0x1p-100f, MOST = 0x1p+100f;

    // Takes in the denominators of a run: the least of them, and the sum of weights in the end.
    __device__ void check(float least, float sum) { serves = serves && least >= LEAST && sum <= MOST; }
};

// The frame for the state before a run whose tokens have `e` as their largest exponent.
template <int STEPS>
__device__ Frame frame_of(const Average& s, float e, int rows, float l2, float u2) {
    const float decayed = fmaf(s.n + float(STEPS), l2, s.q);
    const float top = fmaxf(decayed, e);
    const float bonus2 = u2 + l2;
    const bool serves = rows == STEPS && fabsf(bonus2) <= Frame::MOST_BONUS;
    return {exp2_approx(decayed - (top - HEADROOM)), top, exp2_approx(bonus2), serves};
}

// The state in row `i_s` of states [.., 3, 1, C].
template <int C>
__device__ Average load_state(const float* states, i64 i_s, int i_c) {
    const float* row = states + i_s * 3 * C + i_c;
    return {row[0], row[C], row[2 * C] * LOG2_E, 0.0f};
}

template <int C>
__device__ void store_state(float* states, i64 i_s, int i_c, const Average& s, float l2) {
    float* row = states + i_s * 3 * C + i_c;
    row[0] = s.a;
    row[C] = s.b;
    row[2 * C] = s.exponent(l2) * LN_2;
}

// `rows` of the STEPS tokens of one channel as they lie in memory, C elements apart.
template <int C, int STEPS, class T>
__device__ void load_tokens(T (&x)[STEPS], const T* src, int rows) {
    if (rows == STEPS) {
        #pragma unroll
        for (int i_r = 0; i_r < STEPS; ++i_r) x[i_r] = load_nc<1>(src + i64(i_r) * C).at[0];
    } else {
        #pragma unroll
        for (int i_r = 0; i_r < STEPS; ++i_r) {
            if (i_r < rows) x[i_r] = load_nc<1>(src + i64(i_r) * C).at[0];
        }
    }
}

// How many of the STEPS tokens from number `start` on a sequence of `len` has.
template <int STEPS>
__device__ int rows_from(i64 start, i64 len) { return int(min(max(len - start, i64(0)), i64(STEPS))); }

}  // namespace fla::rwkv4
