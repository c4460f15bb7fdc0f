// Stands in for the CUDA driver, cuBLASLt and, by fake_gpu.py, the CUDA runtime inside libmlx.so. Memory is the host's,
// copies copy, host functions run at once, launches do nothing; the device says that it is of sm_90 with 80 GiB.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define PAGE ((size_t)4096)

typedef int status;
typedef void* object;

static size_t next_object = 1 << 20;
static status new_object(object* out) { *out = (object)(next_object += 64); return 0; }

#define NOTHING(NAME) status NAME() { return 0; }
#define OBJECT(NAME) status NAME(object* out) { return new_object(out); }

// --------------------------------------------------------------------------------- the driver, as libmlx.so links it
OBJECT(cuGraphAddKernelNode_v2)
OBJECT(cuGraphCreate)
OBJECT(cuModuleGetFunction)
OBJECT(cuModuleLoadDataEx)
NOTHING(cuFuncSetAttribute)
NOTHING(cuGraphKernelNodeSetAttribute)
NOTHING(cuLaunchKernelEx)
NOTHING(cuModuleUnload)
NOTHING(cuTensorMapEncodeTiled)
status cuGetErrorString(status code, const char** text) { *text = "said by the fake GPU"; return 0; }
status cuGraphGetNodes(object graph, object nodes, size_t* count) { *count = 0; return 0; }
status cuOccupancyMaxPotentialBlockSize(int* grid, int* block) { *grid = 132; *block = 1024; return 0; }

// ------------------------------------------------------------------------------------------------------------ cuBLASLt
OBJECT(cublasLtCreate)
OBJECT(cublasLtMatmulDescCreate)
OBJECT(cublasLtMatmulPreferenceCreate)
OBJECT(cublasLtMatrixLayoutCreate)
NOTHING(cublasLtDestroy)
NOTHING(cublasLtMatmul)
NOTHING(cublasLtMatmulDescDestroy)
NOTHING(cublasLtMatmulDescSetAttribute)
NOTHING(cublasLtMatmulPreferenceDestroy)
NOTHING(cublasLtMatmulPreferenceSetAttribute)
NOTHING(cublasLtMatrixLayoutDestroy)
NOTHING(cublasLtMatrixLayoutSetAttribute)
status cublasLtMatmulAlgoGetHeuristic(object lt, object desc, object a, object b, object c, object d, object preference,
                                      int wanted, void* results, int* found) {
  memset(results, 0, 96);
  *found = wanted > 0;
  return 0;
}

// ------------------------------------------------- the runtime: what fake_gpu.py names; every other function is nothing
NOTHING(nothing)
// cutlass asks for cuTensorMapEncodeTiled in this way.
status entry_point(const char* name, object* out, unsigned long long flags, int* found) {
  *out = (object)nothing;
  if (found) *found = 0;
  return 0;
}
status entry_point_of(const char* name, object* out, unsigned version, unsigned long long flags, int* found) {
  return entry_point(name, out, flags, found);
}
OBJECT(object_out)
// Pages that nobody touches cost nothing, since the system hands out zeros: sizes may be nonsense, as results are.
status allocate(object* out, size_t bytes) {
  size_t whole = PAGE + (bytes + PAGE - 1) / PAGE * PAGE;
  size_t* start = mmap(NULL, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) { fprintf(stderr, "no %zu bytes\n", bytes); return 2; }
  *start = whole;
  *out = (char*)start + PAGE;
  return 0;
}
status release(object memory) {
  if (memory == NULL) return 0;
  size_t* start = (size_t*)((char*)memory - PAGE);
  munmap(start, *start);
  return 0;
}
status copy(void* to, const void* from, size_t bytes) { memmove(to, from, bytes); return 0; }
status fill(void* to, int byte, size_t bytes) { memset(to, byte, bytes); return 0; }
status one(int* out) { *out = 1; return 0; }
status zero(int* out) { *out = 0; return 0; }
status attribute(int* out, int which) {
  switch (which) {
    case 1: *out = 1024; break;                // threads of a block
    case 8: *out = 48 << 10; break;            // shared memory of a block
    case 10: *out = 32; break;                 // lanes
    case 16: *out = 132; break;                // multiprocessors
    case 39: *out = 2048; break;               // threads of a multiprocessor
    case 75: *out = 9; break;                  // compute capability 9.0
    case 76: *out = 0; break;
    case 81: case 97: *out = 227 << 10; break; // shared memory of a multiprocessor, of a block that asks for it
    default: *out = 1;
  }
  return 0;
}
status memory(size_t* unused, size_t* total) { *unused = *total = (size_t)80 << 30; return 0; }
status pool(object which, int what, size_t* out) { *out = 0; return 0; }
status host(object stream, void (*function)(void*), void* data) { function(data); return 0; }
status second_object(object stream, object* out) { return new_object(out); }
status no_nodes(object graph, object nodes, size_t* count) { *count = 0; return 0; }
status updated(object made, object graph, int* result) { *result = 0; return 0; }
status function_facts(size_t* out) { memset(out, 0, 64); ((int*)out)[6] = 1024; return 0; }
status properties(char* out) { memset(out, 0, 512); strcpy(out, "NVIDIA fake"); return 0; }
const char* text() { return "said by the fake GPU"; }

// --------------------------------------------------------------------------- NVRTC, where nothing is to be compiled
#ifdef WITHOUT_NVRTC
OBJECT(nvrtcCreateProgram)
NOTHING(nvrtcDestroyProgram)
NOTHING(nvrtcAddNameExpression)
NOTHING(nvrtcCompileProgram)
status nvrtcGetLoweredName(object program, const char* name, const char** lowered) { *lowered = name; return 0; }
static status one_byte(size_t* size) { *size = 1; return 0; }
static status no_text(char* text) { *text = 0; return 0; }
status nvrtcGetPTXSize(object program, size_t* size) { return one_byte(size); }
status nvrtcGetCUBINSize(object program, size_t* size) { return one_byte(size); }
status nvrtcGetProgramLogSize(object program, size_t* size) { return one_byte(size); }
status nvrtcGetPTX(object program, char* code) { return no_text(code); }
status nvrtcGetCUBIN(object program, char* code) { return no_text(code); }
status nvrtcGetProgramLog(object program, char* log) { return no_text(log); }
status nvrtcVersion(int* major, int* minor) { *major = 13; *minor = 0; return 0; }
const char* nvrtcGetErrorString(status code) { return "said by the fake NVRTC"; }
#endif
