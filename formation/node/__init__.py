"""The roof beam: wires the rooms together, offers the HTTP API, carries events up, starts and drains.

| file | does |
|---|---|
| settings | the node's settings, typed, and the capacity it offers |
| identity | the node's key and manifest |
| telemetry | structured logs |
| health | who is alive, and since when not |
| dispatch | events → handlers: the only way anything travels up the house |
| stream, event_query | events → server-sent events; what somebody who asks for them wants |
| reads | the replicated state as the API's answers |
| attach | logs and consoles, also of VMs on other nodes |
| permit | a user's signed leave to show something |
| problem | an error as the API tells it |
| forward | reads of another node's API, by its operators' permits |
| door | looks at intents before they enter the log; hands them to a voter where this node is none |
| api | HTTP on a unix socket, and on TCP with a token |
| wiring | builds adapters and services, once |
| run | nursery tree, start order, drain |
"""
