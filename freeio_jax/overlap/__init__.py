"""Exchanges that run beside compute.

pending.py is the API. start_done.py has the primitives that start an exchange, wait for it, and put
compute between the two; calls.py their custom calls. derivative.py lets what lies between start and
done in the forward program lie between them in the backward program.
"""
