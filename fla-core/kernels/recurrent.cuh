// recurrent: the walk over the tokens of a sequence with a part of its matrix state in the registers of a warp. What a
// token does to the state is the model's; where states lie and how lanes share them is here.
#pragma once
#include <fla/core/copy.cuh>
#include <fla/core/prelude.cuh>
#include <fla/core/states.cuh>
#include <fla/core/warp.cuh>

namespace fla {

// The widest access, in elements, that keeps every row of `row` elements aligned when the first one is.
template <class T>
__device__ constexpr int access_elems(int row) {
    int n = 16 / sizeof(T);
    while (row % n != 0) n /= 2;
    return n;
}

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

// Whether states pass through the caches and leave nothing there: `Cfg::STATES_PASS`, no unless the kernel says so.
template <class Cfg>
inline constexpr bool STATES_PASS = false;
template <class Cfg>
    requires(Cfg::STATES_PASS)
inline constexpr bool STATES_PASS<Cfg> = true;

// Whether states in memory are [V, K] and not [K, V]: `Cfg::VALUE_MAJOR`, no unless the kernel says so.
template <class Cfg>
inline constexpr bool VALUE_MAJOR = false;
template <class Cfg>
    requires(Cfg::VALUE_MAJOR)
inline constexpr bool VALUE_MAJOR<Cfg> = true;

// How the lanes of a warp share a part of a state [K, V]: LANES_V of them side by side over V, each with COLS columns, which
// are 16 bytes of state; 32 / LANES_V over K, each with BK rows.
template <class Cfg>
struct Lanes {
    using Element = typename Cfg::Element;
    using State = typename Cfg::State;
    static constexpr int K = Cfg::K, V = Cfg::V, LANES_V = Cfg::LANES_V, LANES_K = 32 / LANES_V;
    static constexpr int COLS = 16 / sizeof(State);
    static constexpr int BV = COLS * LANES_V;  // columns of a warp
    static constexpr int SLICES = ceil_div(V, BV);
    static constexpr int K_ACCESS = access_elems<Element>(K);
    static constexpr int BK = ceil_div(ceil_div(K, LANES_K), K_ACCESS) * K_ACCESS;  // rows of a lane
    static constexpr int STATE_ACCESS = access_elems<State>(V);
    // Of a column of a state [V, K].
    static constexpr int COLUMN_ACCESS = min(access_elems<State>(K), K_ACCESS);
    // Accesses of a vector over V, of which a lane has COLS elements.
    template <class T>
    static constexpr int V_ACCESS = min(access_elems<T>(V), COLS);

    int row0, col0;
    // Rows and columns of this lane that exist; may be more than it has, or none.
    int rows, cols;

    __device__ explicit Lanes(int i_v) {
        row0 = lane_id() / LANES_V * BK;
        col0 = i_v * BV + lane_id() % LANES_V * COLS;
        rows = BK * LANES_K == K ? BK : K - row0;
        cols = V % BV == 0 ? COLS : V - col0;
    }

    // This lane's part of a vector over K or V; `src` is the whole vector.
    template <class T>
    __device__ void load_k(T (&x)[BK], const T* src) const { load_masked<access_elems<T>(K)>(x, src + row0, rows); }
    template <class T>
    __device__ void load_v(T (&x)[COLS], const T* src) const { load_masked<V_ACCESS<T>>(x, src + col0, cols); }

    // Stores a vector over V that every lane of a column holds.
    template <class T>
    __device__ void store_v(T* dst, const float (&x)[COLS]) const {
        constexpr int N = V_ACCESS<T>;
        if (row0 != 0) return;
        #pragma unroll
        for (int j = 0; j < COLS; j += N) {
            Vec<T, N> piece;
            #pragma unroll
            for (int c = 0; c < N; ++c) piece.at[c] = from_f32<T>(x[j + c]);
            if (j < cols) store<N>(dst + col0 + j, piece);
        }
    }

    // This lane's part of a state; zeros from null.
    __device__ void load_state(float (&r_state)[BK][COLS], const State* src) const {
        if constexpr (VALUE_MAJOR<Cfg>) {
            load_columns(r_state, src);
            return;
        }
        if constexpr (STATES_PASS<Cfg>) {
            load_passing(r_state, src);
            return;
        }
        const State* own = src + row0 * V + col0;  // one address, from which the rows are constants
        #pragma unroll
        for (int i = 0; i < BK; ++i) {
            #pragma unroll
            for (int j = 0; j < COLS; j += STATE_ACCESS) {
                Vec<State, STATE_ACCESS> piece = {};
                if (src != nullptr && i < rows && j < cols) {
                    piece = load_stream<STATE_ACCESS>(own + i * V + j);
                }
                #pragma unroll
                for (int c = 0; c < STATE_ACCESS; ++c) r_state[i][j + c] = to_f32(piece.at[c]);
            }
        }
    }

    __device__ void store_state(State* dst, const float (&r_state)[BK][COLS]) const {
        if constexpr (VALUE_MAJOR<Cfg>) {
            store_columns(dst, r_state);
            return;
        }
        if constexpr (STATES_PASS<Cfg>) {
            store_passing(dst, r_state);
            return;
        }
        State* own = dst + row0 * V + col0;
        #pragma unroll
        for (int i = 0; i < BK; ++i) {
            #pragma unroll
            for (int j = 0; j < COLS; j += STATE_ACCESS) {
                Vec<State, STATE_ACCESS> piece;
                #pragma unroll
                for (int c = 0; c < STATE_ACCESS; ++c) piece.at[c] = from_f32<State>(r_state[i][j + c]);
                if (i < rows && j < cols) store<STATE_ACCESS>(own + i * V + j, piece);
            }
        }
    }

    // The same from and to a state [V, K], where a lane's rows of a column lie side by side.
    __device__ void load_columns(float (&r_state)[BK][COLS], const State* src) const {
        const State* own = src + i64(col0) * K + row0;
        #pragma unroll
        for (int c = 0; c < COLS; ++c) {
            #pragma unroll
            for (int i = 0; i < BK; i += COLUMN_ACCESS) {
                Vec<State, COLUMN_ACCESS> piece = {};
                if (src != nullptr && i < rows && c < cols) piece = load_stream<COLUMN_ACCESS>(own + c * K + i);
                #pragma unroll
                for (int r = 0; r < COLUMN_ACCESS; ++r) r_state[i + r][c] = to_f32(piece.at[r]);
            }
        }
    }
    __device__ void store_columns(State* dst, const float (&r_state)[BK][COLS]) const {
        State* own = dst + i64(col0) * K + row0;
        #pragma unroll
        for (int c = 0; c < COLS; ++c) {
            #pragma unroll
            for (int i = 0; i < BK; i += COLUMN_ACCESS) {
                Vec<State, COLUMN_ACCESS> piece;
                #pragma unroll
                for (int r = 0; r < COLUMN_ACCESS; ++r) piece.at[r] = from_f32<State>(r_state[i + r][c]);
                if (i < rows && c < cols) store<COLUMN_ACCESS>(own + c * K + i, piece);
            }
        }
    }

    // The first element of this lane. From there everything lies at offsets that the compiler knows.
    template <class T>
    __device__ T* own(T* state) const { return state + (i64(row0) * V + col0); }

    // The same as above, without a test and an address for every access, which costs registers in other places.
    __device__ void load_passing(float (&r_state)[BK][COLS], const State* src) const {
        if (src == nullptr) {
            #pragma unroll
            for (int i = 0; i < BK; ++i) {
                #pragma unroll
                for (int c = 0; c < COLS; ++c) r_state[i][c] = 0.0f;
            }
            return;
        }
        const State* const at = own(src);
        #pragma unroll
        for (int i = 0; i < BK; ++i) {
            #pragma unroll
            for (int j = 0; j < COLS; j += STATE_ACCESS) {
                Vec<State, STATE_ACCESS> piece = {};
                if (i < rows && j < cols) piece = load_stream_rows<STATE_ACCESS>(at + i * V + j);
                #pragma unroll
                for (int c = 0; c < STATE_ACCESS; ++c) r_state[i][j + c] = to_f32(piece.at[c]);
            }
        }
    }
    __device__ void store_passing(State* dst, const float (&r_state)[BK][COLS]) const {
        State* const at = own(dst);
        #pragma unroll
        for (int i = 0; i < BK; ++i) {
            #pragma unroll
            for (int j = 0; j < COLS; j += STATE_ACCESS) {
                Vec<State, STATE_ACCESS> piece;
                #pragma unroll
                for (int c = 0; c < STATE_ACCESS; ++c) piece.at[c] = from_f32<State>(r_state[i][j + c]);
                if (i < rows && j < cols) store_stream<STATE_ACCESS>(at + i * V + j, piece);
            }
        }
    }
};

// Which states of a sequence a warp works on: head `i_h` of `h`.
struct StateHead {
    i64 i_n;
    i64 h, i_h;

    // The first element of this head in state number `state` of `elems` each.
    __device__ i64 at(i64 state, i64 elems) const { return (state * h + i_h) * elems; }
};

// Keeps the state after token `i_t` where it is asked for: after every token, in the slot of that token, and after the last
// token of a sequence. In REVERSE tokens are counted from the end of the sequence, where the walk starts.
template <bool REVERSE = false, class Cfg, int BK, int COLS, class State>
__device__ void keep_state(
    const Lanes<Cfg>& lanes,
    const States<State>& states,
    const StateHead& head,
    const Sequence& seq,
    i64 first,
    i64 i_t,
    const float (&r_state)[BK][COLS]
) {
    constexpr i64 ELEMS = i64(Cfg::K) * Cfg::V;
    State* dst = states.tokens == nullptr ? nullptr : states.tokens + head.at(i_t, ELEMS);
    // One text for both places: the compiler would keep the addresses of each in registers.
    #pragma unroll 1
    for (int i = 0; i < 2; ++i) {
        if (dst != nullptr) lanes.store_state(dst, r_state);
        if (i == 1 || states.last == nullptr) return;
        const i64 number = REVERSE ? seq.eos - 1 - i_t : i_t - seq.bos;
        const i64 state = state_after(states, head.i_n, first, number, seq.eos - seq.bos);
        dst = state == NO_STATE ? nullptr : states.last + head.at(state, ELEMS);
    }
}

// What a sequence gives whose slot is not to be touched: zeros.
template <class Cfg, class Write>
__device__ void write_zeros(
    const Lanes<Cfg>& lanes,
    const States<typename Cfg::State>& states,
    const StateHead& head,
    const Sequence& seq,
    Write write
) {
    float r_o[Lanes<Cfg>::COLS] = {};
    float r_state[Lanes<Cfg>::BK][Lanes<Cfg>::COLS] = {};
    for (i64 i_t = seq.bos; i_t < seq.eos; ++i_t) {
        write(i_t, r_o);
        if (states.tokens != nullptr) {
            lanes.store_state(states.tokens + head.at(i_t, i64(Cfg::K) * Cfg::V), r_state);
        }
    }
}

// The walk of `walk_tokens`. What keeps states on the way has a text of its own: in the loop of the other its mere presence
// costs a seventh of the time.
template <bool KEEPS, bool REVERSE, class Cfg, class Load, class Step, class Write>
__device__ void walk_from(
    i64 first,
    const Lanes<Cfg>& lanes,
    const States<typename Cfg::State>& states,
    const StateHead& head,
    const Sequence& seq,
    Load load,
    Step step,
    Write write
) {
    using L = Lanes<Cfg>;
    using Token = decltype(load(i64(0)));
    constexpr i64 ELEMS = i64(Cfg::K) * Cfg::V;

    constexpr i64 STEP = REVERSE ? -1 : 1;
    const i64 start = REVERSE ? seq.eos - 1 : seq.bos;
    const i64 end = REVERSE ? seq.bos - 1 : seq.eos;  // excluded
    // Asked for before the state, which is much larger and would keep it waiting.
    Token next = {};
    if (Cfg::ONE_TOKEN || (Cfg::PREFETCH && start != end)) next = load(start);

    float r_state[L::BK][L::COLS];  // [BK, COLS] of [K, V]
    lanes.load_state(r_state, states.initial == nullptr ? nullptr : states.initial + head.at(first, ELEMS));

    float r_o[L::COLS];
    if constexpr (Cfg::ONE_TOKEN) {
        step(r_state, r_o, next);
        write(start, r_o);
        if constexpr (KEEPS) keep_state<REVERSE>(lanes, states, head, seq, first, start, r_state);
    } else {
        for (i64 i_t = start; i_t != end; i_t += STEP) {
            Token x;
            if constexpr (Cfg::PREFETCH) {
                x = next;
                if (i_t + STEP != end) next = load(i_t + STEP);
            } else {
                x = load(i_t);
            }
            step(r_state, r_o, x);
            write(i_t, r_o);
            if constexpr (KEEPS) keep_state<REVERSE>(lanes, states, head, seq, first, i_t, r_state);
        }
    }
    // A sequence without tokens hands its state through; in a pool it is there already.
    const bool is_kept = KEEPS && (seq.bos < seq.eos || states.slots != nullptr);
    if (states.last != nullptr && !is_kept) lanes.store_state(states.last + head.at(head.i_n, ELEMS), r_state);
}

// Walks over the tokens of a sequence, from the first to the last or in REVERSE from the last to the first. `load(i_t)` asks
// for the vectors of a token; `step(r_state, r_o, x)` applies a token to the state and returns its output, or each lane's
// part of it; `write(i_t, r_o)` stores that.
//
// A sequence whose slot is not to be touched gives zeros.
template <class Cfg, bool REVERSE = false, class Load, class Step, class Write>
__device__ void walk_tokens(
    const Lanes<Cfg>& lanes,
    const States<typename Cfg::State>& states,
    const StateHead& head,
    const Sequence& seq,
    Load load,
    Step step,
    Write write
) {
    if (states.slots == nullptr && states.tokens == nullptr) {
        walk_from<false, REVERSE>(head.i_n, lanes, states, head, seq, load, step, write);
        return;
    }
    const i64 first = own_first_state(states, head.i_n);
    if (first == NO_STATE) {
        write_zeros(lanes, states, head, seq, write);
        return;
    }
    walk_from<true, REVERSE>(first, lanes, states, head, seq, load, step, write);
}

}  // namespace fla
