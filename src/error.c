/* error.c: composing the one error message. */
#include "error.h"

#include <stdarg.h>
#include <stdio.h>

#undef error_set
int error_set(struct error *error, int code, const char *format, ...) {
  if (error->code == 0) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
    error->code = code;
  }
  return error->code;
}
