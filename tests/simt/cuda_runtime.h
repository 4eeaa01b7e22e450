// Stands in for the header of the toolkit: all of it is in simt.h, which comes first.
#pragma once

#include "simt.h"
