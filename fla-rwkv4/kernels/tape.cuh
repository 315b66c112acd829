// tape: what a run of tokens leaves behind for its gradients, and the way back over it.
//
// With s = (a, b, e) the state before a token, s' the one after it, and da, db the gradients of a and b as they are
// stored, that is for a fixed exponent:
//
//   h   = do_t / D_t                      D_t the denominator of (1) without its exponent
//   da  = old da' + old_o h               old, new: weights of s and of the token in s', at most 1
//   db  = old db' - old_o h o_t           old_o, new_o: their weights in o_t, at most 1
//   dv  = new da' + new_o h
//   dk  = new (v_t da' + db') + new_o h (v_t - o_t)
//   du += new_o h (v_t - o_t)
//
// No factor exceeds 1, so nothing can overflow that is finite in the end. The gradient of l = -e^w, the sum of
// old (a da' + b db'), is taken on the way forward, from the derivatives la, lb of a and b in l since the run's start:
//
//   dl += old_o h (la - o_t lb)           la' = old (la + a), lb' = old (lb + b)
//
// and la da + lb db for the gradients after the run. So a and b need not be kept for the way back.
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/math.cuh>
#include <fla/core/prelude.cuh>
#include <fla/rwkv4/average.cuh>

namespace fla::rwkv4 {

template <int STEPS>
struct Tape {
    float v[STEPS];
    float old[STEPS];
    float added[STEPS];    // new
    float h_old[STEPS];    // old_o h
    float h_added[STEPS];  // new_o h
    float miss[STEPS];     // v - o, formed without the difference of what is nearly equal
    float la;              // derivatives in l of a and b after the run
    float lb;
    float dl;
    float du;
};

// What a run does to the gradients of the state: those before it are (keep da + a, keep db + b).
struct alignas(16) Passage {
    float a;
    float b;
    float keep;
    float n;  // tokens since the one that set the exponent; all of the run's when none of them did
};

// Walks `rows` of the STEPS tokens, STEPS when FULL, whose values are on the tape, from the state `s` to the one after
// them.
template <bool FULL, int STEPS>
__device__ Passage record(Tape<STEPS>& tape, Average& s, const float (&k2)[STEPS], const float (&d_o)[STEPS], int rows,
                          float l2, float u2) {
    Passage x = {0.0f, 0.0f, 1.0f, 0.0f};
    tape.la = tape.lb = tape.dl = tape.du = 0.0f;
    // Counted from here, so that it tells whether one of these tokens set the exponent.
    s = {s.a, s.b, s.exponent(l2), 0.0f};
    #pragma unroll
    for (int i_r = 0; i_r < STEPS; ++i_r) {
        if (!FULL && i_r >= rows) break;
        const float v = tape.v[i_r];
        const Weights in_o = weigh(fmaf(s.n, l2, s.q - k2[i_r] - u2));
        const float share = rcp_approx(fmaf(in_o.old, s.b, in_o.added));
        const float h = d_o[i_r] * share;
        tape.miss[i_r] = fmaf(s.b, v, -s.a) * (in_o.old * share);
        tape.h_old[i_r] = in_o.old * h;
        tape.h_added[i_r] = in_o.added * h;

        const float minus_o = tape.miss[i_r] - v;
        const float before = x.keep * tape.h_old[i_r];
        x.a += before;
        x.b = fmaf(before, minus_o, x.b);
        tape.dl = fmaf(tape.h_old[i_r], fmaf(minus_o, tape.lb, tape.la), tape.dl);
        tape.du = fmaf(tape.h_added[i_r], tape.miss[i_r], tape.du);

        const float n = s.n + 1.0f;
        const float lead = fmaf(n, l2, s.q - k2[i_r]);
        const Weights weight = weigh(lead);
        tape.old[i_r] = weight.old;
        tape.added[i_r] = weight.added;
        x.keep *= weight.old;
        tape.la = weight.old * (tape.la + s.a);
        tape.lb = weight.old * (tape.lb + s.b);
        s.a = fmaf(weight.old, s.a, weight.added * v);
        s.b = fmaf(weight.old, s.b, weight.added);
        s.q = lead > 0.0f ? s.q : k2[i_r];
        s.n = lead > 0.0f ? n : 0.0f;
    }
    x.n = s.n;
    return x;
}

// The same in one frame, for a whole run whose weights there are on the tape as `added`. Old weights are 1, and need no
// tape. Tells by the frame whether it serves.
template <int STEPS>
__device__ Passage record_framed(Tape<STEPS>& tape, Frame& frame, const Average& s, const float (&d_o)[STEPS]) {
    float a = s.a * frame.old, b = s.b * frame.old, least = Frame::MOST;
    Passage x = {0.0f, 0.0f, 0.0f, 0.0f};
    tape.la = tape.lb = tape.dl = tape.du = 0.0f;
    #pragma unroll
    for (int i_r = 0; i_r < STEPS; ++i_r) {
        const float v = tape.v[i_r], added = tape.added[i_r], bonus = added * frame.bonus;
        const float denominator = b + bonus;
        least = fminf(least, denominator);
        const float share = rcp_approx(denominator);
        const float h = d_o[i_r] * share;
        const float miss = fmaf(b, v, -a) * share;
        const float minus_o = miss - v;
        x.a += h;
        x.b = fmaf(h, minus_o, x.b);
        tape.dl = fmaf(h, fmaf(minus_o, tape.lb, tape.la), tape.dl);
        tape.du = fmaf(bonus * h, miss, tape.du);
        tape.h_old[i_r] = h;
        tape.miss[i_r] = miss;
        tape.la += a;
        tape.lb += b;
        a = fmaf(added, v, a);
        b += added;
    }
    frame.check(least, b);
    x.a *= frame.old;
    x.b *= frame.old;
    x.keep = frame.old * NO_HEADROOM;
    tape.la *= NO_HEADROOM;
    tape.lb *= NO_HEADROOM;
    return x;
}

// Gradients of a state: of numerator and denominator, and the part of the last exponent's gradient that has not yet
// found the token which set it.
struct StateGrad {
    float a;
    float b;
    float pending;
};

// Takes the gradients back over a run of `rows` tokens.
__device__ inline void pass(StateGrad& d, const Passage& x, int rows) {
    d.a = fmaf(x.keep, d.a, x.a);
    d.b = fmaf(x.keep, d.b, x.b);
    if (x.n < float(rows)) d.pending = 0.0f;
}

// Gradients of decay and bonus that a thread sums up, a run at a time, so that long sequences lose little.
struct Totals {
    float dl;
    float du;

    // Adds a run, for the gradients `d` after it.
    template <int STEPS>
    __device__ void add(const Tape<STEPS>& tape, const Passage& x, const StateGrad& d) {
        // The last exponent has decayed once for every token since the one that set it.
        dl += tape.dl + fmaf(tape.la, d.a, fmaf(tape.lb, d.b, d.pending * x.n));
        du += tape.du;
    }
};

// Walks back over what `record` left, from the gradients after the run, and calls `put(row, dk, dv)` for every token.
template <bool FULL, int STEPS, class Put>
__device__ void rewind(const Tape<STEPS>& tape, StateGrad d, const Passage& x, int rows, Put put) {
    const int i_setter = rows - 1 - int(x.n);  // below 0 when the exponent is older than the run
    #pragma unroll
    for (int i_r = STEPS - 1; i_r >= 0; --i_r) {
        if (FULL || i_r < rows) {
            const float v = tape.v[i_r], miss = tape.miss[i_r], old = tape.old[i_r], added = tape.added[i_r];
            const float dv = fmaf(added, d.a, tape.h_added[i_r]);
            float dk = fmaf(added, fmaf(v, d.a, d.b), tape.h_added[i_r] * miss);
            if (i_r == i_setter) dk += d.pending;
            put(i_r, dk, dv);
            d.a = fmaf(old, d.a, tape.h_old[i_r]);
            d.b = fmaf(old, d.b, tape.h_old[i_r] * (miss - v));
        }
    }
}

// The same for what `record_framed` left; no exponent's gradient is pending.
template <int STEPS, class Put>
__device__ void rewind_framed(const Tape<STEPS>& tape, const Frame& frame, StateGrad d, Put put) {
    d.a *= NO_HEADROOM;
    d.b *= NO_HEADROOM;
    #pragma unroll
    for (int i_r = STEPS - 1; i_r >= 0; --i_r) {
        const float v = tape.v[i_r], miss = tape.miss[i_r], added = tape.added[i_r], h = tape.h_old[i_r];
        const float h_bonus = frame.bonus * h;
        const float dv = added * (d.a + h_bonus);
        const float dk = added * fmaf(h_bonus, miss, fmaf(v, d.a, d.b));
        put(i_r, dk, dv);
        d.a += h;
        d.b = fmaf(h, miss - v, d.b);
    }
}

}  // namespace fla::rwkv4
