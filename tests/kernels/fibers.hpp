// Threads that change places when they say so: a stack and what is left on it.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t STACK = 512 * 1024;
#else
constexpr size_t STACK = 128 * 1024;
#endif

#if defined(__x86_64__)
// Only what the ABI keeps over a call changes hands: some nanoseconds, and no system call as in swapcontext.
struct Context {
    void *stack;
};
extern "C" void emulated_switch(Context *from, Context *to);
asm(R"(
.text
.local emulated_switch
.type emulated_switch, @function
emulated_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulated_switch, .-emulated_switch
)");

static void prepare(Context &context, char *stack, void (*entry)()) {
    // As if `entry` had been called: the stack is 16-byte aligned before the return address was pushed.
    void **top = (void **)(stack + STACK) - 2;
    top[0] = (void *)entry;
    top[1] = nullptr;
    context.stack = top - 6;
    memset(context.stack, 0, 6 * sizeof(void *));
}
#else
struct Context {
    ucontext_t saved;
};
static void emulated_switch(Context *from, Context *to) { swapcontext(&from->saved, &to->saved); }

static void prepare(Context &context, char *stack, void (*entry)()) {
    getcontext(&context.saved);
    context.saved.uc_stack.ss_sp = stack;
    context.saved.uc_stack.ss_size = STACK;
    context.saved.uc_link = nullptr;
    makecontext(&context.saved, entry, 0);
}
#endif

static char *new_stack() {
    // Below it a page that nobody may touch.
    void *at = mmap(nullptr, STACK + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        abort();
    mprotect(at, 4096, PROT_NONE);
    return (char *)at + 4096;
}
