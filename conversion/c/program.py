"""A main function for a network's C file."""


def main_program(name: str = 'net', separate: bool = False) -> str:
    """Returns a main function: float32 images from standard input, a line of logits for each; with
    an argument N the milliseconds of one image, the least of N tries, on images of 0.5. separate:
    its first argument is the file of constants."""
    upper = name.upper()
    load = f"""
  FILE *file = count > 1 ? fopen(arguments[1], "rb") : NULL;
  char *constants = malloc({upper}_DATA);
  if (!file || !constants || fread(constants, 1, {upper}_DATA, file) != {upper}_DATA) {{
    fprintf(stderr, "the first argument must be the file of the weights\\n");
    return 1;
  }}
  {name}_data = constants;
  count--, arguments++;"""
    return f"""
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static float image[{upper}_CHANNELS * {upper}_HEIGHT * {upper}_WIDTH];
static float workspace[{upper}_WORKSPACE], logits[{upper}_CLASSES];

int main(int count, char **arguments) {{{load if separate else ''}
  if (count > 1) {{
    double least = 1e9;
    for (int i = 0; i < (int)(sizeof image / sizeof *image); i++) image[i] = 0.5f;
    for (int i = 0; i < atoi(arguments[1]); i++) {{
      clock_t start = clock();
      {name}_logits(image, 1, logits, workspace);
      double taken = 1e3 * (double)(clock() - start) / CLOCKS_PER_SEC;
      if (taken < least) least = taken;
    }}
    printf("%.4f ms\\n", least);
    return 0;
  }}
  while (fread(image, sizeof image, 1, stdin) == 1) {{
    {name}_logits(image, 1, logits, workspace);
    for (int k = 0; k < {upper}_CLASSES; k++) printf(k ? " %.9g" : "%.9g", (double)logits[k]);
    printf("\\n");
  }}
  return 0;
}}
"""
