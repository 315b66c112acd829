// copy: asynchronous copies from global to shared memory, and vector loads and stores of global memory.
#pragma once
#include <fla/core/prelude.cuh>

namespace fla {

// Copies `src_bytes` of 16 bytes and writes zeros for the rest; with 0, `src` is not read. Both addresses are multiples
// of 16. The copy passes by L1: every tile is read once per block.
__device__ inline void cp_async_cg_16(void* s_dst, const void* src, int src_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_addr(s_dst)), "l"(src), "r"(src_bytes)
                 : "memory");
}

// Closes the group of this thread's copies since the last call.
__device__ inline void cp_async_commit_group() { asm volatile("cp.async.commit_group;" : : : "memory"); }

// Waits until at most PENDING of this thread's youngest groups are under way. What the older ones copied is then
// visible to this thread; to others after a barrier.
template <int PENDING>
__device__ void cp_async_wait_group() {
    asm volatile("cp.async.wait_group %0;" : : "n"(PENDING) : "memory");
}

// 4, 8 or 16 bytes in registers.
template <int N>
struct alignas(4 * N) Words {
    u32 at[N];
};

// Loads through the read-only path: the memory must not be written while the kernel runs.
__device__ inline void ld_global_nc(Words<1>& w, const void* src) {
    asm volatile("ld.global.nc.b32 %0, [%1];" : "=r"(w.at[0]) : "l"(src));
}
__device__ inline void ld_global_nc(Words<2>& w, const void* src) {
    asm volatile("ld.global.nc.v2.b32 {%0, %1}, [%2];" : "=r"(w.at[0]), "=r"(w.at[1]) : "l"(src));
}
__device__ inline void ld_global_nc(Words<4>& w, const void* src) {
    asm volatile("ld.global.nc.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
                 : "l"(src));
}

// Loads that leave L1 to others; the memory may be written by this kernel, as a state that is updated in place is.
__device__ inline void ld_global_no_allocate(Words<1>& w, const void* src) {
    asm volatile("ld.global.L1::no_allocate.b32 %0, [%1];" : "=r"(w.at[0]) : "l"(src) : "memory");
}
__device__ inline void ld_global_no_allocate(Words<2>& w, const void* src) {
    asm volatile("ld.global.L1::no_allocate.v2.b32 {%0, %1}, [%2];"
                 : "=r"(w.at[0]), "=r"(w.at[1])
                 : "l"(src)
                 : "memory");
}
__device__ inline void ld_global_no_allocate(Words<4>& w, const void* src) {
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
                 : "l"(src)
                 : "memory");
}

// The same, and the 256 bytes around it come to L2.
__device__ inline void ld_global_no_allocate_l2_256(Words<4>& w, const void* src) {
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
                 : "l"(src)
                 : "memory");
}

__device__ inline void st_global(void* dst, const Words<1>& w) {
    asm volatile("st.global.b32 [%0], %1;" : : "l"(dst), "r"(w.at[0]) : "memory");
}
__device__ inline void st_global(void* dst, const Words<2>& w) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" : : "l"(dst), "r"(w.at[0]), "r"(w.at[1]) : "memory");
}
__device__ inline void st_global(void* dst, const Words<4>& w) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(dst), "r"(w.at[0]), "r"(w.at[1]), "r"(w.at[2]), "r"(w.at[3])
                 : "memory");
}

// Stores that are the first to leave L2: for results that nobody reads soon.
__device__ inline void st_global_cs(void* dst, const Words<1>& w) {
    asm volatile("st.global.cs.b32 [%0], %1;" : : "l"(dst), "r"(w.at[0]) : "memory");
}
__device__ inline void st_global_cs(void* dst, const Words<2>& w) {
    asm volatile("st.global.cs.v2.b32 [%0], {%1, %2};" : : "l"(dst), "r"(w.at[0]), "r"(w.at[1]) : "memory");
}
__device__ inline void st_global_cs(void* dst, const Words<4>& w) {
    asm volatile("st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(dst), "r"(w.at[0]), "r"(w.at[1]), "r"(w.at[2]), "r"(w.at[3])
                 : "memory");
}

// N elements that move with one instruction; in memory they lie at a multiple of their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
    static constexpr int BYTES = sizeof(T) * N;
    static constexpr int WORDS = BYTES / 4;
    static_assert(BYTES == 2 || BYTES == 4 || BYTES == 8 || BYTES == 16, "one access is 2, 4, 8 or 16 bytes");
    T at[N];
};

// N elements of an input that the kernel does not write.
template <int N, class T>
__device__ Vec<T, N> load_nc(const T* src) {
    if constexpr (Vec<T, N>::BYTES == 2) {
        return {*src};
    } else {
        Words<Vec<T, N>::WORDS> w;
        ld_global_nc(w, src);
        return __builtin_bit_cast(Vec<T, N>, w);
    }
}

// N elements that are used once, or that this kernel writes too.
template <int N, class T>
__device__ Vec<T, N> load_stream(const T* src) {
    if constexpr (Vec<T, N>::BYTES == 2) {
        return {*src};
    } else {
        Words<Vec<T, N>::WORDS> w;
        ld_global_no_allocate(w, src);
        return __builtin_bit_cast(Vec<T, N>, w);
    }
}

// The same of rows that are read whole, whose 256 bytes come to L2 together.
template <int N, class T>
__device__ Vec<T, N> load_stream_rows(const T* src) {
    if constexpr (Vec<T, N>::BYTES < 16) {
        return load_stream<N>(src);
    } else {
        Words<4> w;
        ld_global_no_allocate_l2_256(w, src);
        return __builtin_bit_cast(Vec<T, N>, w);
    }
}

template <int N, class T>
__device__ void store(T* dst, const Vec<T, N>& x) {
    if constexpr (Vec<T, N>::BYTES == 2) {
        *dst = x.at[0];
    } else {
        st_global(dst, __builtin_bit_cast(Words<Vec<T, N>::WORDS>, x));
    }
}

// A store of what nobody reads soon.
template <int N, class T>
__device__ void store_stream(T* dst, const Vec<T, N>& x) {
    if constexpr (Vec<T, N>::BYTES == 2) {
        *dst = x.at[0];
    } else {
        st_global_cs(dst, __builtin_bit_cast(Words<Vec<T, N>::WORDS>, x));
    }
}

// Reads SIZE elements of shared memory, 16 bytes with one access or as many as there are.
template <int SIZE, class T>
__device__ void read_shared(T (&x)[SIZE], const T* s_src) {
    constexpr int N = min(int(16 / sizeof(T)), SIZE);
    #pragma unroll
    for (int i = 0; i < SIZE; i += N) {
        const Vec<T, N> piece = *reinterpret_cast<const Vec<T, N>*>(s_src + i);
        #pragma unroll
        for (int j = 0; j < N; ++j) x[i + j] = piece.at[j];
    }
}

}  // namespace fla
