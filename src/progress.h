/* progress.h: where a long run stands, on stderr: a bar redrawn in place on a terminal, a line a block in a log. Under mpirun stderr is
 * a pipe even on a terminal, so OMNIQUANT_PROGRESS=bar (or =lines) in the environment overrides the guess. */
#ifndef OMNIQUANT_PROGRESS_H
#define OMNIQUANT_PROGRESS_H

struct progress; /* one run; every function takes NULL and does nothing then, so ranks other than 0 hold NULL */

/* Starts the clock. NULL without memory: the run goes on without it. */
struct progress *progress_open(const char *label, /* of the bar: "calibrate"; must outlive the run */
                               int blocks);       /* how many blocks the run will do, > 0 */

/* Tells of an epoch that is done. Shown on a terminal only, some times a second at most. */
void progress_epoch(struct progress *progress, int block, /* blocks done before this one: 0 for the run's first */
                    int epoch, int epochs,                /* epochs of this block done, and of all */
                    double loss);                         /* mean over the epoch; NaN if unknown */

/* Tells that a block is done. In a log one line: "block 3/30  TEXT  12.3 s  left 5m20s". */
void progress_block(struct progress *progress, int block, /* blocks done before this one: 0 for the run's first */
                    const char *text);                    /* what is worth telling of it: "rtn 0.2137  end 0.1142  kept end" */

/* Ends the bar's line and frees. */
void progress_close(struct progress *progress);

#endif
