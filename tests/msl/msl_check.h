// Declarations only, for `clang++ -fsyntax-only --target=aarch64`: gives the MSL address spaces real, incompatible
// pointer types, which g++ and the emulator do not. bfloat is any distinct floating type here (clang before 17 has no
// arithmetic of its own for it); that it needs explicit casts is checked by the emulator.
#pragma once
#include <stdint.h>
#include <stddef.h>
#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
typedef unsigned char uchar; typedef unsigned short ushort; typedef unsigned int uint; typedef unsigned long ulong;
typedef _Float16 half; typedef long double bfloat; typedef half float16_t; typedef bfloat bfloat16_t;
#define V(T, N) typedef T N##2 __attribute__((ext_vector_type(2))); typedef T N##3 __attribute__((ext_vector_type(3))); typedef T N##4 __attribute__((ext_vector_type(4)));
V(float, float) V(half, half) V(int, int) V(uint, uint) V(uchar, uchar) V(char, char) V(ushort, ushort) V(short, short)
#undef V
#define INFINITY __builtin_inff()
enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_texture };
namespace metal {
using ::mem_flags;
template <typename A, typename B> A as_type(B);
#define M1(f) float f(float); half f(half); bfloat f(bfloat);
#define ALL M1(exp) M1(exp2) M1(log) M1(log2) M1(sqrt) M1(rsqrt) M1(sin) M1(cos) M1(tanh) M1(floor) M1(ceil) M1(trunc) M1(rint) M1(round) M1(fabs)
ALL namespace precise { ALL } namespace fast { ALL }
M1(abs) int abs(int); float pow(float, float); float fma(float, float, float);
template <typename T> T min(T, T); template <typename T> T max(T, T); template <typename T> T clamp(T, T, T); template <typename T> T select(T, T, bool);
bool isnan(float); bool isinf(float); uint popcount(uint); uint clz(uint); uint ctz(uint);
float dot(float4, float4); float dot(float3, float3); float dot(float2, float2);
void threadgroup_barrier(mem_flags); void simdgroup_barrier(mem_flags);
#define S1(f) template <typename T> T f(T);
S1(simd_sum) S1(simd_product) S1(simd_max) S1(simd_min) S1(simd_or) S1(simd_and) S1(simd_xor) S1(simd_broadcast_first) S1(simd_prefix_inclusive_sum) S1(simd_prefix_exclusive_sum) S1(quad_sum)
#define S2(f) template <typename T> T f(T, ushort);
S2(simd_shuffle) S2(simd_broadcast) S2(simd_shuffle_xor) S2(simd_shuffle_up) S2(simd_shuffle_down)
bool simd_all(bool); bool simd_any(bool); bool simd_is_first();
// Types that Metal's own headers put here and `using namespace metal` brings in: a kernel's helper of such a name is ambiguous.
struct level; struct bias; struct gradient2d; struct gradient3d; struct gradientcube; struct min_lod_clamp; struct sampler;
template <typename T, size_t N> struct array; template <typename T> struct atomic; template <typename T> struct visible_function_table;
struct simd_vote { typedef uint64_t vote_t; explicit operator vote_t() const; bool all() const; bool any() const; }; simd_vote simd_ballot(bool);
}
using namespace metal;
