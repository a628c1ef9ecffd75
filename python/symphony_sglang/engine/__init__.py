"""SGLang's side of the package: everything that touches its scheduler, tree and pools.

=============  =====================================================================
plugin         what SGLang calls in every process; registers the rest
compat         the seams we stand on, checked at start; refuses a different SGLang
cache          the radix cache with levels (a subclass of SGLang's unified cache)
stack          builds the host level for a CPU machine
host_pool      host memory pages, copied by torch
messages       what travels between the HTTP process and the schedulers
control        answers those messages inside each scheduler
routes         the ``/symphony/*`` routes of the HTTP process
residency      how full each level is
launch         turns our settings into SGLang's arguments
=============  =====================================================================
"""
