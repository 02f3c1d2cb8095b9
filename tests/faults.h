/* faults.h: makes one call fail: the n-th read (for good, or as a hiccup: once), write, fsync, rename, open, allocation, MPI call, poll of MPI or mapping of this
 * program's own code. The calls are
 * taken over by the linker (--wrap, tests/CMakeLists.txt), so the program itself knows nothing of it. */
#ifndef OMNIQUANT_FAULTS_H
#define OMNIQUANT_FAULTS_H

enum fault {
  FAULT_READ,
  FAULT_HICCUP,
  FAULT_WRITE,
  FAULT_FSYNC,
  FAULT_RENAME,
  FAULT_OPEN,
  FAULT_MALLOC,
  FAULT_COLLECTIVE,
  FAULT_POLL,
  FAULT_MAP,
  FAULTS
};

/* "read", "write", ... */
extern const char *const fault_names[FAULTS];

/* From now on the n-th call of that kind fails, counted from 1; 0: none. */
void fault_arm(enum fault kind, long n);

/* Calls of the armed kind since then: n or more if it has failed. */
long fault_calls(void);

#endif
