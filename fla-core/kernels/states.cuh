// states: which state a sequence starts from and where it leaves the new one: tensors with a state for each sequence, one
// tensor that is updated in place, or a pool whose slots are read on the device.
#pragma once
#include <fla/core/prelude.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// With a pool, sequence n has the slots of row n, M of them. It starts from column `accepted[n] - 1`, or 0, and its state
// after token number i goes to column min(i, M - 1). A slot outside of the pool, or one that an earlier sequence has, is
// neither read nor written.
template <class State>
struct States {
    const State* initial;  // [N, ...]     null: zero; with a pool [S, ...]
    State* last;           // [N, ...]     null: not wanted; with a pool the same [S, ...]
    State* tokens;         // [B, T, ...]  state after every token; null: not wanted
    const i32* slots;      // [N, M]       null: no pool
    const i32* accepted;   // [N]          null: every sequence starts from column 0
    i64 pool_len;          // S
    i32 m;                 // M
};

inline constexpr i64 NO_STATE = -1;

// The tokens of sequence `i_n`: from `bos` to `eos`, which is excluded.
struct Sequence {
    i64 bos, eos;
};

// Offsets that were made on the device are not trusted: whatever they are, the sequence lies inside of the `t` tokens.
__device__ inline Sequence sequence_of(const i64* cu_seqlens, i64 i_n, i64 t) {
    if (cu_seqlens == nullptr) return {i_n * t, i_n * t + t};
    const i64 bos = min(max(cu_seqlens[i_n], 0ll), t);
    return {bos, min(max(cu_seqlens[i_n + 1], bos), t)};
}

template <class State>
__device__ i64 slot_of(const States<State>& states, i64 i_n, i32 column) {
    const i32 slot = states.slots[i_n * states.m + column];
    return slot >= 0 && slot < states.pool_len ? slot : NO_STATE;
}

// The state that sequence `i_n` starts from.
template <class State>
__device__ i64 first_state(const States<State>& states, i64 i_n) {
    if (states.slots == nullptr) return i_n;
    const i32 column = states.accepted == nullptr ? 0 : states.accepted[i_n] - 1;
    return column >= 0 && column < states.m ? slot_of(states, i_n, column) : NO_STATE;
}

// Whether an earlier sequence has this slot too. The whole warp asks.
template <class State>
__device__ bool is_taken(const States<State>& states, i64 i_n, i64 slot) {
    bool taken = false;
    #pragma unroll 8
    for (i64 i = lane_id(); i < i_n * states.m; i += 32) taken |= states.slots[i] == slot;
    return __any_sync(FULL_WARP, taken);
}

// The same, but nowhere when an earlier sequence has the slot. The whole warp asks.
template <class State>
__device__ i64 own_first_state(const States<State>& states, i64 i_n) {
    const i64 first = first_state(states, i_n);
    return states.slots != nullptr && first != NO_STATE && is_taken(states, i_n, first) ? NO_STATE : first;
}

// Where the state after token number `i` of `len` goes, or nowhere: the last column is for the last token alone. `first` is
// the sequence's own first state. The whole warp asks.
template <class State>
__device__ i64 state_after(const States<State>& states, i64 i_n, i64 first, i64 i, i64 len) {
    if (states.slots == nullptr) return i + 1 == len ? i_n : NO_STATE;
    if (i + 1 < len && i + 1 >= states.m) return NO_STATE;
    const i64 slot = slot_of(states, i_n, i32(min(i, i64(states.m) - 1)));
    return slot == NO_STATE || slot == first || !is_taken(states, i_n, slot) ? slot : NO_STATE;
}

}  // namespace fla
