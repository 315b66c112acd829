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
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/tma.cuh>
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
    const i64* cu_seqlens;       // [N + 1]       null: here every sequence has t tokens
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
    Cfg::K;         // key channels
    Cfg::V;         // value channels
    Cfg::TOKENS;    // most tokens of a sequence
    Cfg::LANES_V;   // lanes side by side over V, each with 4 columns; the others lie over K
    Cfg::WARPS;     // warps of a group, side by side over V
    Cfg::GROUPS;    // groups of a block
    Cfg::KEY_AND_RATE;  // a is a key and b its rate: the transition is diag(e^g) - (a b) a^T
    Cfg::SLOTS;     // states under way or in use for a group
};

// A state with the vectors of its tokens, as they lie in global memory.
template <class Cfg>
struct alignas(128) RecurrentFwdSlot {
    using Element = typename Cfg::Element;
    float state[Cfg::K * Cfg::V];               // [K, V]
    Element q[Cfg::TOKENS * Cfg::K];            // [TOKENS, K], and so on
    Element k[Cfg::TOKENS * Cfg::K];
    Element a[Cfg::TOKENS * Cfg::K];
    Element b[Cfg::TOKENS * Cfg::K];
    Element g[Cfg::TOKENS * Cfg::K];
    Element v[Cfg::TOKENS * Cfg::V];            // [TOKENS, V]
};

template <class Cfg>
struct RecurrentFwdShared {
    RecurrentFwdSlot<Cfg> slots[Cfg::GROUPS][Cfg::SLOTS];
    Barrier full[Cfg::GROUPS][Cfg::SLOTS];
};

// Starts the copies of state `i_nh` into a slot; one thread of the group does.
template <RecurrentFwdConfig Cfg>
__device__ void load_slot(
    RecurrentFwdSlot<Cfg>& s_slot,
    Barrier& full,
    const RecurrentFwdParams<typename Cfg::Element>& p,
    u32 i_nh
) {
    using Element = typename Cfg::Element;
    constexpr int K = Cfg::K, V = Cfg::V;
    constexpr u32 K_BYTES = K * sizeof(Element), V_BYTES = V * sizeof(Element), STATE_BYTES = K * V * sizeof(float);
    const u32 i_n = i_nh / u32(p.h), i_h = i_nh % u32(p.h);
    const int tokens = int(p.t);
    const u32 state_bytes = p.initial_state != nullptr ? STATE_BYTES : 0;

    mbarrier_arrive_expect_tx(full, state_bytes + tokens * (5 * K_BYTES + V_BYTES));
    if (state_bytes != 0) {
        cp_async_bulk_shared_global(s_slot.state, p.initial_state + i64(i_nh) * (K * V), STATE_BYTES, full);
    }
    for (int i_t = 0; i_t < tokens; ++i_t) {
        const i64 row = (i64(i_n) * tokens + i_t) * p.h + i_h;
        cp_async_bulk_shared_global(s_slot.a + i_t * K, p.a + row * K, K_BYTES, full);
        cp_async_bulk_shared_global(s_slot.g + i_t * K, p.g + row * K, K_BYTES, full);
        cp_async_bulk_shared_global(s_slot.b + i_t * K, p.b + row * K, K_BYTES, full);
        cp_async_bulk_shared_global(s_slot.k + i_t * K, p.k + row * K, K_BYTES, full);
        cp_async_bulk_shared_global(s_slot.q + i_t * K, p.q + row * K, K_BYTES, full);
        cp_async_bulk_shared_global(s_slot.v + i_t * V, p.v + row * V, V_BYTES, full);
    }
}

// Reads SIZE elements of shared memory, 16 bytes with one access or as many as there are.
template <int SIZE, class T>
__device__ void read(T (&x)[SIZE], const T* s_src) {
    constexpr int N = min(int(16 / sizeof(T)), SIZE);
    #pragma unroll
    for (int i = 0; i < SIZE; i += N) {
        const Vec<T, N> piece = *reinterpret_cast<const Vec<T, N>*>(s_src + i);
        #pragma unroll
        for (int j = 0; j < N; ++j) x[i + j] = piece.at[j];
    }
}

template <RecurrentFwdConfig Cfg>
__device__ void recurrent_fwd(const RecurrentFwdParams<typename Cfg::Element>& p) {
    using Element = typename Cfg::Element;
    constexpr int K = Cfg::K, V = Cfg::V, LANES_V = Cfg::LANES_V, SLOTS = Cfg::SLOTS;
    constexpr int BV = COLS * LANES_V;       // columns of a warp
    constexpr int BK = K * LANES_V / 32;     // rows of a lane
    static_assert(BV * Cfg::WARPS == V && BK * 32 == K * LANES_V, "the lanes of a group cover the state");
    static_assert(BK * sizeof(Element) % 16 == 0, "the rows of a lane are whole accesses of shared memory");

    extern __shared__ __align__(128) unsigned char s_bytes[];
    auto& s = *reinterpret_cast<RecurrentFwdShared<Cfg>*>(s_bytes);
    const int group = threadIdx.x / 32 / Cfg::WARPS, i_v = threadIdx.x / 32 % Cfg::WARPS;
    const bool leads = i_v == 0 && lane_id() == 0;
    const u32 states = u32(p.n) * p.h;  // the host keeps it below 2^31
    const u32 stride = gridDim.x * Cfg::GROUPS;
    const u32 first = blockIdx.x * Cfg::GROUPS + group;

    if (leads) {
        for (int i = 0; i < SLOTS; ++i) mbarrier_init(s.full[group][i], 1);
        fence_mbarrier_init();  // the copy engine sees the barriers
        for (int i = 0; i < SLOTS; ++i) {
            if (first + i * stride < states) load_slot<Cfg>(s.slots[group][i], s.full[group][i], p, first + i * stride);
        }
    }
    __syncthreads();  // the barriers are initialised

    const int row0 = lane_id() / LANES_V * BK;
    const int col0 = i_v * BV + lane_id() % LANES_V * COLS;
    int slot = 0;
    u32 parity = 0;
    for (u32 i_nh = first; i_nh < states; i_nh += stride) {
        RecurrentFwdSlot<Cfg>& s_slot = s.slots[group][slot];
        mbarrier_wait_parity(s.full[group][slot], parity);  // the slot holds state i_nh and its vectors

        float r_state[BK][COLS] = {};  // [BK, COLS] of [K, V]
        if (p.initial_state != nullptr) {
            #pragma unroll
            for (int i = 0; i < BK; ++i) read(r_state[i], s_slot.state + (row0 + i) * V + col0);
        }
        const u32 i_n = i_nh / u32(p.h), i_h = i_nh % u32(p.h);
        for (int i_t = 0; i_t < int(p.t); ++i_t) {
            Token<Element, BK> x;
            read(x.a, s_slot.a + i_t * K + row0);
            read(x.g, s_slot.g + i_t * K + row0);
            read(x.b, s_slot.b + i_t * K + row0);
            read(x.k, s_slot.k + i_t * K + row0);
            read(x.q, s_slot.q + i_t * K + row0);
            read(x.v, s_slot.v + i_t * V + col0);
            float r_o[COLS];
            recurrent_step<LANES_V, Cfg::KEY_AND_RATE>(r_state, r_o, x);
            if (row0 == 0) {
                Vec<Element, COLS> piece;
                #pragma unroll
                for (int c = 0; c < COLS; ++c) piece.at[c] = from_f32<Element>(p.scale * r_o[c]);
                store<COLS>(p.o + ((i64(i_n) * p.t + i_t) * p.h + i_h) * V + col0, piece);
            }
        }
        // Every warp of the group has read the slot, and it is free.
        if constexpr (Cfg::WARPS == 1) {
            __syncwarp();
        } else {
            bar_sync(1 + group, 32 * Cfg::WARPS);
        }
        if (leads && states - i_nh > SLOTS * stride) {
            fence_proxy_async();  // the copy engine writes after these reads
            load_slot<Cfg>(s_slot, s.full[group][slot], p, i_nh + SLOTS * stride);
        }
        if (p.final_state != nullptr) {
            #pragma unroll
            for (int i = 0; i < BK; ++i) {
                const Vec<float, COLS> piece = {r_state[i][0], r_state[i][1], r_state[i][2], r_state[i][3]};
                store<COLS>(p.final_state + (i64(i_nh) * K + row0 + i) * V + col0, piece);
            }
        }
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
        parity ^= slot == 0;
    }
}

}  // namespace fla::dplr
