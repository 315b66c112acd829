// decay: log decays of the tokens of a chunk, summed up from references that keep every factor in range.
//
// A token i that reads and one j before it that writes meet through e^{sum of g over j < s < i}, or over j < s <= i. That is
// one factor for i times one for j, each a sum of log decays between its token and a reference, for each channel. With the
// reference at the start of the chunk no factor is above one over the decay of the chunk, and bf16 has the range of f32.
// Where a channel decays by more in the chunk than a model allows for that, or than e^-STEP in a token, pairs are taken
// level by level instead: those in the two halves of the chunk, in the two halves of a half and so on, each with its
// reference between the halves, where no factor is above 1; and those of a token with itself, where there is none. Nothing
// overflows, and nothing is a difference of larger numbers.
#pragma once
#include <fla/core/blocks.cuh>
#include <fla/core/chunk.cuh>
#include <fla/core/prelude.cuh>

namespace fla {

// Decay of a token, in nats, up to which one reference will do: of pairs that cancel in the gradient of a decay, rounding
// of f32 is left, which is to be small beside e^-STEP.
inline constexpr float STEP = 8.0f;

// The references. STARTED: the start of the chunk. EXACT: what reads counts from the chunk's start, what writes to its end.
// LEVEL + i: between the halves of each block of 16 >> i tokens.
enum Mode { STARTED, EXACT, LEVEL, DIAGONAL = LEVEL + 4, MODES };

// Whether the pair of a reading and a writing token belongs to a mode that has pairs. Of a pair of one token, only queries
// read what it writes.
__device__ inline bool is_pair(int mode, int reads, int writes, bool is_q) {
    if (mode == STARTED) return reads > writes || (is_q && reads == writes);
    if (mode == DIAGONAL) return is_q && reads == writes;
    // The highest bit in which the tokens differ says where they part.
    const int half = CHUNK / 2 >> (mode - LEVEL), differ = reads ^ writes;
    return reads > writes && differ >= half && differ < 2 * half;
}

// How often the log decay of token `of` is in the factor of a token, 0, 1 or -1.
struct DecaySigns {
    int incl;  // from the reference to after the token
    int excl;  // from the reference to before the token
    int back;  // from after the token to the reference, or with EXACT to the end

    __device__ DecaySigns(int mode, int token, int of) : incl(of <= token), excl(of < token), back(of > token) {
        if (mode == STARTED) {
            back = -incl;
        } else if (mode == DIAGONAL) {
            incl = excl = back = 0;
        } else if (mode != EXACT) {
            // The reference is before the upper half.
            const int half = CHUNK / 2 >> (mode - LEVEL);
            const bool same_half = (token ^ of) < half, upper = (token & half) != 0;
            incl &= same_half && upper;
            excl &= same_half && upper;
            back &= same_half && !upper;
        }
    }
};

// Whether a token decays by more than e^-STEP.
template <int P>
__device__ bool has_step(const FragB<P>& g) {
    // Of parts, the first is the number to 8 bits.
    const u32(&x)[2][2] = g.at[0];
    const u32 least = min_bf16x2(min_bf16x2(x[0][0], x[0][1]), min_bf16x2(x[1][0], x[1][1]));
    const float2 both = unpack2<bf16>(least);
    return min(both.x, both.y) < -STEP;
}

}  // namespace fla
