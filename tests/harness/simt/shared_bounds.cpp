// Marks an end of the kernels' static shared variables. They are thread-local, and the linker lays
// thread-local variables out in the order of the objects: this file stands before the kernels' object as
// simt_shared_begin, and after it as simt_shared_end. Other objects come before the first: what they hold is
// not shared memory.
extern __thread char SIMT_BOUND[16] __attribute__((aligned(16)));
__thread char SIMT_BOUND[16];
