/* error.h: the one error path. A function that can fail returns 0 or an error code and composes the message once, where the
 * fact is known; everyone above passes it on, and main prints it once, from rank 0. */
#ifndef OMNIQUANT_ERROR_H
#define OMNIQUANT_ERROR_H

enum {
  ERROR_WORK = 1,  /* failed at work: I/O, memory, a peer, a device */
  ERROR_INPUT = 2, /* wrong usage or input: nothing was started */
  ERROR_STOPPED =
      75, /* by a signal or by another rank's death: what is stored is whole, the same command goes on (EX_TEMPFAIL of sysexits.h) */
};

/* Zero-initialize before use: struct error error = {0}; */
struct error {
  int code;           /* 0 while nothing failed, else one of these: also the program's exit status */
  char message[1000]; /* one line without newline: the file, the key and the mend */
};

/* Records a failure unless one is recorded already (the first is the cause, what follows is its consequence).
 * Returns the recorded code, so that a caller can `return error_set(...)`. */
int error_set(struct error *error, /* receives code and message */
              int code,            /* one of the above */
              const char *format,  /* printf format of the one line */
              ...) __attribute__((format(printf, 3, 4)));

#ifdef __clang_analyzer__ /* tells it what it cannot see from here: a recorded code is not 0 */
#include <stdio.h>
#define error_set(error, number, ...) (snprintf((error)->message, sizeof(error)->message, __VA_ARGS__), (error)->code = (number))
#endif

#endif
