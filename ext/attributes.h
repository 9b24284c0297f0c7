/* What an instance holds beside items: read, written and made without running code of the user. */
#ifndef THUNDER_ATTRIBUTES_H
#define THUNDER_ATTRIBUTES_H

#include "ext.h"

PyObject *thx_instance_dict(PyObject *object); /* new reference, or NULL without an exception */
/* How many object fields instances have that are not in a __dict__. */
uint32_t thx_count_members(PyTypeObject *type);
/* Is an instance all that its attributes say? Otherwise C fields hold more. */
bool thx_plain_layout(PyTypeObject *type, uint32_t members);
/* The attributes as a dict: the instance's own __dict__, or with members a copy that has them too. NULL without an
 * exception: there are none. */
PyObject *thx_attributes(PyObject *object, bool members);
/* dict: the instance's own, or NULL. */
int thx_set_attribute(PyObject *object, bool members, PyObject *dict, PyObject *name, PyObject *value);
/* An instance as the innermost C __new__ makes it: neither a __new__ nor an __init__ of the user runs. */
PyObject *thx_new_instance(PyTypeObject *type);

#endif
