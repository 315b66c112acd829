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
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>
#include <fla/dplr/recurrent_fwd.cuh>

namespace fla::dplr {

template <class Element>
struct RecurrentFwdParams {
    const Element* q;            // [B, T, H, K]
    const Element* k;            // [B, T, H, K]
    const Element* v;            // [B, T, H, V]
    const Element* a;            // [B, T, H, K]  reads the state; or a key
    const Element* b;            // [B, T, H, K]  writes what a has read; or the rate of the key
    const Element* g;            // [B, T, H, K]  log decay, natural base, at most 0
    const float* initial_state;  // [N, H, K, V]  null: zero
    const i64* cu_seqlens;       // [N + 1]       null: N dense sequences of t tokens
    Element* o;                  // [B, T, H, V]
    float* final_state;          // [N, H, K, V]  null: not wanted
    i64 n;
    i64 t;
    i32 h;
    float scale;
};

template <class Cfg>
concept RecurrentFwdConfig = requires {
    typename Cfg::Element;
    Cfg::K;           // key channels
    Cfg::V;           // value channels
    Cfg::LANES_V;     // lanes side by side over V, each with 4 columns; the others lie over K
    Cfg::WARPS;       // warps of a block
    Cfg::ONE_TOKEN;   // every sequence has exactly one token
    Cfg::KEY_AND_RATE;  // a is a key and b its rate: the transition is diag(e^g) - (a b) a^T
    Cfg::PREFETCH;    // load the next token's vectors while this one's are used
};

// Loads the first `valid` of SIZE elements and zeros for the rest, N with one access; `valid` is a multiple of N.
template <int N, int SIZE, class T>
__device__ void load_masked(T (&x)[SIZE], const T* src, int valid) {
    #pragma unroll
    for (int i = 0; i < SIZE; i += N) {
        Vec<T, N> piece = {};
        if (i < valid) piece = load_nc<N>(src + i);
        #pragma unroll
        for (int j = 0; j < N; ++j) x[i + j] = piece.at[j];
    }
}

template <RecurrentFwdConfig Cfg>
__device__ void recurrent_fwd(const RecurrentFwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    constexpr int K = Cfg::K, V = Cfg::V, LANES_V = Cfg::LANES_V;
    constexpr int BV = COLS * LANES_V;  // columns of a warp
    constexpr int LANES_K = 32 / LANES_V;
    constexpr int K_ACCESS = access_elems<Element>(K);
    constexpr int BK = ceil_div(ceil_div(K, LANES_K), K_ACCESS) * K_ACCESS;  // rows of a lane
    constexpr int V_ACCESS = min(access_elems<Element>(V), COLS);
    constexpr int STATE_ACCESS = access_elems<float>(V);

    // Slices of one head are neighbours, so that a block reads whole rows of a state.
    const u32 i_slice = blockIdx.x * Cfg::WARPS + threadIdx.x / 32;  // the host keeps it below 2^31
    const int i_v = i_slice % ceil_div(V, BV);
    const u32 i_nh = i_slice / ceil_div(V, BV);
    const u32 i_n = i_nh / u32(p.h);
    const u32 i_h = i_nh % u32(p.h);
    if (i_n >= p.n) return;

    const int row0 = lane_id() / LANES_V * BK;
    const int col0 = i_v * BV + lane_id() % LANES_V * COLS;
    // Rows and columns of this lane that exist; may be more than it has, or none.
    const int rows = BK * LANES_K == K ? BK : K - row0;
    const int cols = V % BV == 0 ? COLS : V - col0;
    const i64 state0 = (i64(i_nh) * K + row0) * V + col0;

    i64 bos = i_n * p.t, eos = bos + p.t;
    if (p.cu_seqlens != nullptr) {
        bos = p.cu_seqlens[i_n];
        eos = p.cu_seqlens[i_n + 1];
    }

    const auto load_token = [&](i64 i_t) {
        const i64 row = i_t * p.h + i_h;
        const i64 at_k = row * K + row0;
        Token<Element, BK> x;
        load_masked<K_ACCESS>(x.a, p.a + at_k, rows);
        load_masked<K_ACCESS>(x.g, p.g + at_k, rows);
        load_masked<K_ACCESS>(x.b, p.b + at_k, rows);
        load_masked<K_ACCESS>(x.k, p.k + at_k, rows);
        load_masked<K_ACCESS>(x.q, p.q + at_k, rows);
        load_masked<V_ACCESS>(x.v, p.v + row * V + col0, cols);
        return x;
    };
    // Asked for before the state, which is much larger and would keep it waiting.
    Token<Element, BK> next = {};
    if (Cfg::ONE_TOKEN || (Cfg::PREFETCH && bos < eos)) next = load_token(bos);

    float r_state[BK][COLS];  // [BK, COLS] of [K, V]
    #pragma unroll
    for (int i = 0; i < BK; ++i) {
        #pragma unroll
        for (int j = 0; j < COLS; j += STATE_ACCESS) {
            Vec<float, STATE_ACCESS> piece = {};
            if (p.initial_state != nullptr && i < rows && j < cols) {
                piece = load_stream<STATE_ACCESS>(p.initial_state + state0 + i64(i) * V + j);
            }
            #pragma unroll
            for (int c = 0; c < STATE_ACCESS; ++c) r_state[i][j + c] = piece.at[c];
        }
    }

    const auto step = [&](i64 i_t, const Token<Element, BK>& x) {
        float r_o[COLS];
        recurrent_step<LANES_V, Cfg::KEY_AND_RATE>(r_state, r_o, x);
        if (row0 == 0) {
            #pragma unroll
            for (int j = 0; j < COLS; j += V_ACCESS) {
                Vec<Element, V_ACCESS> piece;
                #pragma unroll
                for (int c = 0; c < V_ACCESS; ++c) piece.at[c] = from_f32<Element>(p.scale * r_o[j + c]);
                if (j < cols) store<V_ACCESS>(p.o + (i_t * p.h + i_h) * V + col0 + j, piece);
            }
        }
    };

    if constexpr (Cfg::ONE_TOKEN) {
        step(bos, next);
    } else if constexpr (Cfg::PREFETCH) {
        for (i64 i_t = bos; i_t < eos; ++i_t) {
            const Token<Element, BK> x = next;
            if (i_t + 1 < eos) next = load_token(i_t + 1);
            step(i_t, x);
        }
    } else {
        for (i64 i_t = bos; i_t < eos; ++i_t) step(i_t, load_token(i_t));
    }

    if (p.final_state != nullptr) {
        #pragma unroll
        for (int i = 0; i < BK; ++i) {
            #pragma unroll
            for (int j = 0; j < COLS; j += STATE_ACCESS) {
                Vec<float, STATE_ACCESS> piece;
                #pragma unroll
                for (int c = 0; c < STATE_ACCESS; ++c) piece.at[c] = r_state[i][j + c];
                if (i < rows && j < cols) store<STATE_ACCESS>(p.final_state + state0 + i64(i) * V + j, piece);
            }
        }
    }
}

}  // namespace fla::dplr
