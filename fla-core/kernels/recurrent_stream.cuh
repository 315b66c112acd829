// recurrent_stream: many states with a few tokens each, which stream through shared memory by bulk copies: a group of warps
// works on one state with its vectors while the next ones are under way.
#pragma once
#include <fla/core/barrier.cuh>
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/recurrent.cuh>
#include <fla/core/states.cuh>
#include <fla/core/tma.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// A state with the vectors of its tokens, as they lie in global memory.
template <class Cfg, class Vectors>
struct alignas(128) StreamSlot {
    typename Cfg::State state[Cfg::K * Cfg::V];  // [K, V]
    Vectors vectors;
    i64 first;                                   // the number of the state, or NO_STATE
};

template <class Cfg, class Vectors>
struct StreamShared {
    StreamSlot<Cfg, Vectors> slots[Cfg::GROUPS][Cfg::SLOTS];
    Barrier full[Cfg::GROUPS][Cfg::SLOTS];
};

// A copy of `elems` elements that is counted at `full`.
template <class T>
__device__ void copy_vector(T* s_dst, const T* src, int elems, Barrier& full) {
    cp_async_bulk_shared_global(s_dst, src, u32(elems * sizeof(T)), full);
}

// Sequences, tokens of each, heads.
struct Batch {
    i64 n, t;
    i32 h;
};

// What a model without numbers beside its vectors asks for.
struct NoNumbers {
    __device__ NoNumbers operator()() const { return {}; }
};

// Walks over the tokens of all states. `copy(s_vectors, full, i_nh)` starts the copies of a state's vectors, `bytes` in all;
// `ask(i_nh)` loads into registers what is too small for such a copy, one state ahead, and calling what it returns gives the
// numbers that are meant; `load(lanes, s_vectors, numbers, i)` makes token number i of both; `step(r_state, r_o, x)` applies
// it; `write(lanes, i_nh, i, r_o)` stores its output.
template <class Cfg, class Vectors, class Copy, class Ask, class Load, class Step, class Write>
__device__ void stream_states(
    StreamShared<Cfg, Vectors>& s,
    const States<typename Cfg::State>& states,
    const Batch& batch,
    u32 bytes,
    Copy copy,
    Ask ask,
    Load load,
    Step step,
    Write write
) {
    using State = typename Cfg::State;
    using L = Lanes<Cfg>;
    constexpr int V = Cfg::V, SLOTS = Cfg::SLOTS, ELEMS = Cfg::K * V;
    constexpr u32 STATE_BYTES = ELEMS * sizeof(State);
    static_assert(L::BV * Cfg::WARPS == V && L::BK * L::LANES_K == Cfg::K, "the lanes of a group cover the state");
    static_assert(
        L::BK * sizeof(typename Cfg::Element) % 16 == 0, "the rows of a lane are whole accesses of shared memory"
    );
    const int group = threadIdx.x / 32 / Cfg::WARPS, i_v = threadIdx.x / 32 % Cfg::WARPS;
    const bool leads = i_v == 0 && lane_id() == 0;
    const i64 t = batch.t;
    const i32 h = batch.h;
    const u32 count = u32(batch.n) * h;  // the host keeps it below 2^31
    const u32 stride = gridDim.x * Cfg::GROUPS;
    const u32 start = blockIdx.x * Cfg::GROUPS + group;

    // Starts the copies of state `i_nh` into a slot; one thread of the group does.
    const auto fill = [&](StreamSlot<Cfg, Vectors>& s_slot, Barrier& full, u32 i_nh) {
        const StateHead head = {i_nh / u32(h), h, i_nh % u32(h)};
        const i64 first = first_state(states, head.i_n);
        const bool has_state = states.initial != nullptr && first != NO_STATE;
        s_slot.first = first;
        mbarrier_arrive_expect_tx(full, bytes + (has_state ? STATE_BYTES : 0));
        if (has_state) copy_vector(s_slot.state, states.initial + head.at(first, ELEMS), ELEMS, full);
        copy(s_slot.vectors, full, i_nh);
    };

    if (leads) {
        for (int i = 0; i < SLOTS; ++i) mbarrier_init(s.full[group][i], 1);
        fence_mbarrier_init();  // the copy engine sees the barriers
        for (int i = 0; i < SLOTS; ++i) {
            if (start + i * stride < count) fill(s.slots[group][i], s.full[group][i], start + i * stride);
        }
    }
    __syncthreads();  // the barriers are initialised

    const L lanes(i_v);
    const bool keeps = states.tokens != nullptr || states.slots != nullptr;
    int slot = 0;
    u32 parity = 0;
    decltype(ask(start)) next = {};
    if (start < count) next = ask(start);
    for (u32 i_nh = start; i_nh < count; i_nh += stride) {
        const auto numbers = next();
        if (count - i_nh > stride) next = ask(i_nh + stride);
        StreamSlot<Cfg, Vectors>& s_slot = s.slots[group][slot];
        mbarrier_wait_parity(s.full[group][slot], parity);  // the slot holds state i_nh and its vectors

        const StateHead head = {i_nh / u32(h), h, i_nh % u32(h)};
        float r_state[L::BK][L::COLS] = {};  // [BK, COLS] of [K, V]
        const auto read_state = [&] {
            if (states.initial == nullptr) return;
            #pragma unroll
            for (int i = 0; i < L::BK; ++i) {
                State x[L::COLS];
                read_shared(x, s_slot.state + (lanes.row0 + i) * V + lanes.col0);
                #pragma unroll
                for (int c = 0; c < L::COLS; ++c) r_state[i][c] = to_f32(x[c]);
            }
        };
        // What keeps states on the way has a text of its own, as in `walk_tokens`.
        if (!keeps) {
            read_state();
            for (int i = 0; i < int(t); ++i) {
                float r_o[L::COLS];
                step(r_state, r_o, load(lanes, s_slot.vectors, numbers, i));
                write(lanes, i_nh, i, r_o);
            }
        } else {
            const Sequence seq = {head.i_n * t, head.i_n * t + t};
            const i64 first = s_slot.first;
            if (states.slots != nullptr && (first == NO_STATE || is_taken(states, head.i_n, first))) {
                write_zeros(lanes, states, head, seq, [&](i64 i_t, float (&r_o)[L::COLS]) {
                    write(lanes, i_nh, int(i_t - seq.bos), r_o);
                });
            } else {
                read_state();
                for (int i = 0; i < int(t); ++i) {
                    float r_o[L::COLS];
                    step(r_state, r_o, load(lanes, s_slot.vectors, numbers, i));
                    write(lanes, i_nh, i, r_o);
                    keep_state(lanes, states, head, seq, first, seq.bos + i, r_state);
                }
            }
        }
        // Every warp of the group has read the slot, and it is free.
        if constexpr (Cfg::WARPS == 1) {
            __syncwarp();
        } else {
            bar_sync(1 + group, 32 * Cfg::WARPS);
        }
        if (leads && count - i_nh > SLOTS * stride) {
            fence_proxy_async();  // the copy engine writes after these reads
            fill(s_slot, s.full[group][slot], i_nh + SLOTS * stride);
        }
        if (states.last != nullptr && !keeps) {
            lanes.store_state(states.last + head.at(head.i_n, ELEMS), r_state);
        }
        slot = slot + 1 == SLOTS ? 0 : slot + 1;
        parity ^= slot == 0;
    }
}

}  // namespace fla
