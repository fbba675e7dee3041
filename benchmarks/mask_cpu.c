/* Answers the instruction cpuid in some libraries with feature bits cleared; benchmarks/mask_cpu.py builds it.
 *
 * The dynamic loader, told by LD_AUDIT, shows it each library once that is mapped and before any of its code runs.
 * MASK_CPU_PLAN names a file of lines
 *   mask LEAF SUBLEAF REGISTER BITS    clear BITS (hexadecimal) of REGISTER (0..3: eax, ebx, ecx, edx)
 *   file NUMBER NAME                   a library, by its file's name
 *   site NUMBER DEVICE INODE ADDRESS   a cpuid instruction (0F A2) at ADDRESS (hexadecimal) of that library
 * In memory only, each site becomes int3 and nop; the handler of SIGTRAP executes cpuid itself. It is not SIGILL
 * because Python's faulthandler, which pytest switches on, takes that one for itself. */
#define _GNU_SOURCE
#include <cpuid.h>
#include <link.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

enum { MASKS = 64, FILES = 64, SITES = 4096, FAILED = 125 };

static struct { unsigned leaf, subleaf, reg, bits; } masks[MASKS];
static struct { unsigned file; unsigned long device, inode, address; } sites[SITES];
static char names[FILES][256];
static unsigned n_masks, n_sites, n_files;

static void fail(const char *thing, const char *what) {
    fprintf(stderr, "mask_cpu: %s: %s\n", thing, what);
    _exit(FAILED);
}

static void answer_cpuid(int number, siginfo_t *info, void *context) {
    greg_t *regs = ((ucontext_t *)context)->uc_mcontext.gregs;
    unsigned leaf = regs[REG_RAX], subleaf = regs[REG_RCX], answer[4];
    (void)number, (void)info;
    __cpuid_count(leaf, subleaf, answer[0], answer[1], answer[2], answer[3]);
    for (unsigned i = 0; i < n_masks; i++)
        if (masks[i].leaf == leaf && masks[i].subleaf == subleaf) answer[masks[i].reg] &= ~masks[i].bits;
    regs[REG_RAX] = answer[0], regs[REG_RBX] = answer[1], regs[REG_RCX] = answer[2], regs[REG_RDX] = answer[3];
}

static void patch(unsigned char *code, const char *library) {
    unsigned long start = (unsigned long)code & ~(sysconf(_SC_PAGESIZE) - 1ul);
    unsigned long size = (unsigned long)code + 2 - start;
    if (code[0] != 0x0f || code[1] != 0xa2) fail(library, "changed since it was read");
    if (mprotect((void *)start, size, PROT_READ | PROT_WRITE)) fail(library, "its code cannot be made writable");
    code[0] = 0xcc, code[1] = 0x90;
    if (mprotect((void *)start, size, PROT_READ | PROT_EXEC)) fail(library, "its code cannot be made executable");
}

static void read_line(const char *line) {
    unsigned number;
    if (n_masks < MASKS && sscanf(line, "mask %u %u %u %x", &masks[n_masks].leaf, &masks[n_masks].subleaf,
                                  &masks[n_masks].reg, &masks[n_masks].bits) == 4 && masks[n_masks].reg < 4)
        n_masks++;
    else if (n_files < FILES && sscanf(line, "file %u %255s", &number, names[n_files]) == 2 && number == n_files)
        n_files++;
    else if (n_sites < SITES && sscanf(line, "site %u %lu %lu %lx", &sites[n_sites].file, &sites[n_sites].device,
                                       &sites[n_sites].inode, &sites[n_sites].address) == 4)
        n_sites++;
    else
        fail(line, "cannot be read, or there are too many such lines");
}

unsigned la_version(unsigned version) {
    const char *path = getenv("MASK_CPU_PLAN");
    FILE *plan = path ? fopen(path, "r") : NULL;
    char line[512];
    if (!plan) fail(path ? path : "MASK_CPU_PLAN", "names no readable file");
    while (fgets(line, sizeof line, plan)) read_line(line);
    fclose(plan);
    struct sigaction action = {.sa_sigaction = answer_cpuid, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
    if (sigaction(SIGTRAP, &action, NULL)) fail("SIGTRAP", "cannot be handled");
    return version < LAV_CURRENT ? version : LAV_CURRENT;
}

unsigned la_objopen(struct link_map *map, Lmid_t space, uintptr_t *cookie) {
    const char *slash = strrchr(map->l_name, '/');
    struct stat file;
    (void)space, (void)cookie;
    if (!slash || stat(map->l_name, &file)) return 0;
    for (unsigned i = 0; i < n_sites; i++) {
        if (strcmp(slash + 1, names[sites[i].file])) continue;
        if (sites[i].device != file.st_dev || sites[i].inode != file.st_ino)
            fail(map->l_name, "is another copy than the one that was read; run the command with the same Python");
        patch((unsigned char *)map->l_addr + sites[i].address, map->l_name);
    }
    return 0;
}
