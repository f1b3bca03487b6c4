/* The builder. Strings and numbers go into cJSON as raw text made here: cJSON alone would pass bad
 * UTF-8 on and print 10^15 with an exponent. */
#include "json.h"

#include <cjson/cJSON.h>

static cJSON *node(struct orch_json *j)
{
    return (cJSON *)j;
}

static struct orch_json *made(cJSON *j)
{
    if (!j)
        abort();
    return (struct orch_json *)j;
}

struct orch_json *orch_json_object(void)
{
    return made(cJSON_CreateObject());
}

struct orch_json *orch_json_array(void)
{
    return made(cJSON_CreateArray());
}

void orch_json_free(struct orch_json *j)
{
    cJSON_Delete(node(j));
}

void orch_json_set_take(struct orch_json *obj, const char *key, struct orch_json *v)
{
    cJSON_DeleteItemFromObjectCaseSensitive(node(obj), key);
    if (!cJSON_AddItemToObject(node(obj), key, node(v)))
        abort();
}

void orch_json_set_str(struct orch_json *obj, const char *key, const char *v)
{
    if (!v) {
        orch_json_set_take(obj, key, made(cJSON_CreateNull()));
        return;
    }
    cleanup_buf struct orch_buf text = { 0 };
    orch_json_quote(&text, orch_slice_str(v));
    orch_json_set_take(obj, key, made(cJSON_CreateRaw(text.p)));
}

void orch_json_set_num(struct orch_json *obj, const char *key, double v)
{
    cleanup_buf struct orch_buf text = { 0 };
    orch_json_put_number(&text, v);
    orch_json_set_take(obj, key, made(cJSON_CreateRaw(text.p)));
}

void orch_json_set_bool(struct orch_json *obj, const char *key, bool v)
{
    orch_json_set_take(obj, key, made(cJSON_CreateBool(v)));
}

void orch_json_add_take(struct orch_json *arr, struct orch_json *v)
{
    if (!cJSON_AddItemToArray(node(arr), node(v)))
        abort();
}

void orch_json_print(const struct orch_json *j, bool pretty, struct orch_buf *out)
{
    char *text = pretty ? cJSON_Print((const cJSON *)j) : cJSON_PrintUnformatted((const cJSON *)j);
    if (!text)
        abort();
    orch_buf_str(out, text);
    cJSON_free(text);
}
