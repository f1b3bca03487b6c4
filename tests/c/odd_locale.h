/* A locale that is odd in what the world's are: a comma in numbers, letters beyond ASCII, an I
 * whose small letter is not i. A program that embeds orch may have set such a one, so tests run in
 * it. Made by libc's localedef. */
#ifndef TESTS_ODD_LOCALE_H
#define TESTS_ODD_LOCALE_H

#include <locale.h>
#include <stdio.h>
#include <stdlib.h>

static inline void odd_locale(void)
{
    char dir[] = "/tmp/orch-test-locale-XXXXXX", command[512];
    if (!mkdtemp(dir))
        abort();
    /* It warns of what is not in the locale, and then ends with 1. */
    snprintf(command, sizeof command,
             "cd %s && cat >map && sed '1,/^END CHARMAP/d' map >odd.src && "
             "localedef -c -i ./odd.src -f ./map ./odd >log 2>&1",
             dir);
    FILE *f = popen(command, "w");
    if (!f)
        abort();
    fputs("<code_set_name> ODD\n<escape_char> /\n<mb_cur_max> 1\nCHARMAP\n", f);
    for (int i = 0; i < 256; i++)
        fprintf(f, "<U%04X> /x%02x odd\n", i, i);
    fputs("END CHARMAP\nescape_char /\n"
          "LC_CTYPE\nupper <U0041>..<U005A>\nlower <U0061>..<U007A>;<U00E4>;<U00FD>\ndigit "
          "<U0030>..<U0039>\n"
          "tolower (<U0041>,<U0061>);(<U0049>,<U00FD>)\nEND LC_CTYPE\n"
          "LC_NUMERIC\ndecimal_point \",\"\nthousands_sep \"\"\ngrouping -1\nEND LC_NUMERIC\n",
          f);
    pclose(f);
    if (setenv("LOCPATH", dir, 1) < 0 || !setlocale(LC_ALL, "odd")) {
        fprintf(stderr, "no odd locale: see %s/log\n", dir);
        abort();
    }
    unsetenv("LOCPATH");
    snprintf(command, sizeof command, "rm -r %s", dir);
    if (system(command) != 0)
        abort();
}

#endif
