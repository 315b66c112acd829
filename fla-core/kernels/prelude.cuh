// prelude: names that every kernel uses. It includes nothing, so NVRTC needs no CUDA headers.
#pragma once

namespace fla {

using i8 = signed char;
using u8 = unsigned char;
using i16 = short;
using u16 = unsigned short;
using i32 = int;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

inline constexpr float LOG2_E = 0x1.715476p+0f;  // log2(e), rounded to f32
inline constexpr float LN_2 = 0x1.62e430p-1f;    // ln(2), rounded to f32
inline constexpr u32 FULL_WARP = 0xffffffffu;

template <class A, class B>
inline constexpr bool same = false;
template <class A>
inline constexpr bool same<A, A> = true;

// 16-bit floats are storage only: arithmetic happens in f32, and every narrowing is written out.
struct alignas(2) bf16 {
    u16 bits;
};

struct alignas(2) f16 {
    u16 bits;
};

__device__ inline float to_f32(float x) { return x; }

// A bf16 is the upper half of an f32.
__device__ inline float to_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

__device__ inline float to_f32(f16 x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
    return y;
}

__device__ inline bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

__device__ inline f16 to_f16(float x) {
    f16 y;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Rounds to nearest even; the identity for f32.
template <class T>
__device__ T from_f32(float x);
template <>
__device__ inline float from_f32<float>(float x) { return x; }
template <>
__device__ inline bf16 from_f32<bf16>(float x) { return to_bf16(x); }
template <>
__device__ inline f16 from_f32<f16>(float x) { return to_f16(x); }

// Two elements in one register, `low` in the lower half; both rounded to nearest even.
template <class T>
__device__ u32 pack2(float low, float high);
template <>
__device__ inline u32 pack2<bf16>(float low, float high) {
    u32 y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
template <>
__device__ inline u32 pack2<f16>(float low, float high) {
    u32 y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// The two elements of a register.
template <class T>
__device__ float2 unpack2(u32 pair) {
    if constexpr (same<T, bf16>) {
        return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
    } else {
        return {to_f32(T{u16(pair & 0xffffu)}), to_f32(T{u16(pair >> 16)})};
    }
}

// The lesser of two bf16 in each half.
__device__ inline u32 min_bf16x2(u32 a, u32 b) {
    u32 y;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// The greater of two bf16 in each half.
__device__ inline u32 max_bf16x2(u32 a, u32 b) {
    u32 y;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
    return y;
}

// Where an object lies in the block's shared memory, as PTX instructions take it.
__device__ inline u32 shared_addr(const void* object) { return u32(__cvta_generic_to_shared(object)); }

// A TMA descriptor, passed by value inside a parameter struct.
struct alignas(64) TensorMap {
    u64 opaque[16];
};

template <bool CONDITION, class A, class B>
struct IfType {
    using Type = A;
};
template <class A, class B>
struct IfType<false, A, B> {
    using Type = B;
};
template <bool CONDITION, class A, class B>
using If = typename IfType<CONDITION, A, B>::Type;

template <class T>
__host__ __device__ constexpr T min(T a, T b) { return a < b ? a : b; }
template <class T>
__host__ __device__ constexpr T max(T a, T b) { return a < b ? b : a; }

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

}  // namespace fla
