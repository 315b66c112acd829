// recurrent_bwd: gradients of RWKV-4's exponential average from the inputs alone, one thread for each channel.
//
//   h_t = do_t / D_t                                     (4)   D_t the denominator of (1)
//   P_{t-1} = e^{-e^w} P_t + h_t                         (5)   gradient of A
//   R_{t-1} = e^{-e^w} R_t - h_t o_t                     (6)   gradient of B
//   dv_t = e^{k_t} P_t + e^{u + k_t} h_t                 (7)
//   dk_t = e^{k_t} (v_t P_t + R_t) + e^{u + k_t} h_t (v_t - o_t)      (8)
//
// The thread walks over the tokens and leaves the state before every STEPS of them in `runs`; on the way back it
// walks each run again from there.
//
// Reference  fla_reference::rwkv4::recurrent_bwd
// Launch     grid groups * ceil(C / 32), block 32: a thread is one channel of every groups-th sequence
// FLA        fused_recurrent_rwkv4
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/states.cuh>
#include <fla/rwkv4/average.cuh>
#include <fla/rwkv4/tape.cuh>

namespace fla::rwkv4 {

template <class Element>
struct RecurrentBwdParams {
    const float* w;              // [C]  raw decay
    const float* u;              // [C]
    const Element* k;            // [B, T, C]
    const Element* v;            // [B, T, C]
    const float* initial_state;  // [N, 3, 1, C]  null: fresh
    const Element* d_o;          // [B, T, C]
    const float* d_final_state;  // [N, 3, 1, C]  null: zero
    const i64* cu_seqlens;       // [N + 1]       null: N dense sequences of t tokens
    Element* dk;                 // [B, T, C]
    Element* dv;                 // [B, T, C]
    float* d_initial_state;      // [N, 3, 1, C]  null: not wanted
    float* partials;             // [groups, 2, C]  sums of dl and du
    float* runs;                 // [runs, 3, C]    state before every run, the exponent to base 2
    i64 n;
    i64 t;
};

template <class Cfg>
concept RecurrentBwdConfig = requires {
    typename Cfg::Element;
    Cfg::C;      // channels
    Cfg::STEPS;  // tokens of a run
};

template <RecurrentBwdConfig Cfg>
__device__ void recurrent_bwd(const RecurrentBwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    constexpr int C = Cfg::C, STEPS = Cfg::STEPS;
    const u32 i_group = blockIdx.x / ceil_div(C, 32), groups = gridDim.x / ceil_div(C, 32);
    const int i_c = blockIdx.x % ceil_div(C, 32) * 32 + threadIdx.x;
    if (i_c >= C) return;
    const float l2 = log_decay(p.w[i_c]) * LOG2_E;
    const float u2 = p.u[i_c] * LOG2_E;
    Totals sums = {0.0f, 0.0f};

    for (i64 i_n = i_group; i_n < p.n; i_n += groups) {
        const Sequence seq = sequence_of(p.cu_seqlens, i_n, p.t);
        const i64 len = seq.eos - seq.bos, first = seq.bos * C + i_c;
        // Of this sequence's own: those before have at most one run each that is not whole.
        const i64 i_run = seq.bos / STEPS + i_n;

        float r_k2[STEPS], r_d_o[STEPS];
        Tape<STEPS> tape = {};
        const auto load = [&](i64 i_t, int rows) {
            Element k[STEPS] = {}, v[STEPS] = {};
            load_tokens<C>(k, p.k + first + i_t * C, rows);
            load_tokens<C>(v, p.v + first + i_t * C, rows);
            #pragma unroll
            for (int i_r = 0; i_r < STEPS; ++i_r) {
                r_k2[i_r] = to_f32(k[i_r]) * LOG2_E;
                tape.v[i_r] = to_f32(v[i_r]);
            }
        };
        Average s = {0.0f, 0.0f, FRESH_EXPONENT * LOG2_E, 0.0f};
        if (p.initial_state != nullptr) s = load_state<C>(p.initial_state, i_n, i_c);
        const Average initial = s;
        for (i64 i_t = 0; i_t < len; i_t += STEPS) {
            float* row = p.runs + (i_run + i_t / STEPS) * 3 * C + i_c;
            row[0] = s.a;
            row[C] = s.b;
            row[2 * C] = s.exponent(l2);
            const int rows = rows_from<STEPS>(i_t, len);
            load(i_t, rows);
            #pragma unroll
            for (int i_r = 0; i_r < STEPS; ++i_r) {
                if (i_r < rows) absorb(s, {tape.v[i_r], 1.0f, r_k2[i_r]}, 1.0f, l2);
            }
        }

        StateGrad d = {0.0f, 0.0f, 0.0f};
        float d_exponent = 0.0f;
        if (p.d_final_state != nullptr) {
            const float* row = p.d_final_state + i_n * 3 * C + i_c;
            d = {row[0], row[C], 0.0f};
            d_exponent = row[2 * C];
            d.pending = d_exponent - fmaf(s.a, d.a, s.b * d.b);
        }
        for (i64 i_t = (len - 1) / STEPS * STEPS; len > 0 && i_t >= 0; i_t -= STEPS) {
            const int rows = rows_from<STEPS>(i_t, len);
            load(i_t, rows);
            Element d_o[STEPS] = {};
            load_tokens<C>(d_o, p.d_o + first + i_t * C, rows);
            #pragma unroll
            for (int i_r = 0; i_r < STEPS; ++i_r) r_d_o[i_r] = to_f32(d_o[i_r]);
            const float* row = p.runs + (i_run + i_t / STEPS) * 3 * C + i_c;
            s = {row[0], row[C], row[2 * C], 0.0f};

            const Passage passage = rows == STEPS ? record<true>(tape, s, r_k2, r_d_o, rows, l2, u2)
                                                  : record<false>(tape, s, r_k2, r_d_o, rows, l2, u2);
            sums.add(tape, passage, d);
            const auto put = [&](int i_r, float dk, float dv) {
                const i64 at = first + (i_t + i_r) * C;
                store<1>(p.dk + at, Vec<Element, 1>{from_f32<Element>(dk)});
                store<1>(p.dv + at, Vec<Element, 1>{from_f32<Element>(dv)});
            };
            if (rows == STEPS) {
                rewind<true>(tape, d, passage, rows, put);
            } else {
                rewind<false>(tape, d, passage, rows, put);
            }
            pass(d, passage, rows);
        }

        if (p.d_initial_state == nullptr) continue;
        float* row = p.d_initial_state + i_n * 3 * C + i_c;
        row[0] = d.a;
        row[C] = d.b;
        row[2 * C] = len > 0 ? fmaf(initial.a, d.a, fmaf(initial.b, d.b, d.pending)) : d_exponent;
    }
    float* partial = p.partials + i64(i_group) * 2 * C + i_c;
    partial[0] = sums.dl;
    partial[C] = sums.du;
}

}  // namespace fla::rwkv4
