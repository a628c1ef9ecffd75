"""SGLang's side of the package: everything that touches its scheduler, tree and pools.

=============  =====================================================================
plugin         what SGLang calls in every process; registers the rest
compat         the seams we stand on, checked at start; refuses a different SGLang
cache          the radix cache with levels (a subclass of SGLang's unified cache)
stack          builds the host level for a CPU machine
host_pool      host memory pages, copied by torch
messages       what travels between the HTTP process and the schedulers
control        answers those messages inside each scheduler
advisories     one rank's advisories: messages in, moves and locks out
mover          reads from storage and loads to the device that advisories have in flight
joins          requests that wait for an advisory's read instead of reading again
queue_holds    prefixes of queued requests, protected until they run
locks          tree locks behind what is protected
demotion       takes a session's KV off the device
rates          measured speeds, and whether a level is worth using
calibration    measures them once at the start
harm           what advisories pushed out, and who missed it
cost           what advisories cost the scheduler thread
routes         the ``/symphony/*`` routes of the HTTP process
residency      how full each level is
launch         turns our settings into SGLang's arguments
=============  =====================================================================
"""
