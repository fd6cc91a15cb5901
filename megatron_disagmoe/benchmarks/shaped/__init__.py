"""Vanilla Megatron with expert parallelism against AF-pipe, step for step, on hosts with links of limited bandwidth.

``cases`` says what is compared, ``one_copy`` is the stronger rival, ``gate`` holds a rank before each step, ``fleet``
keeps every variant's ranks alive and lets one at a time take a step, ``measure`` turns that into rows and ``predict``
adds what the event engine says.
"""
