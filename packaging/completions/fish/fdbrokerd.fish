# fish completion for fdbrokerd
# Written by `make completions`, of what the program says of itself. Runs nothing.

complete -c fdbrokerd -f
complete -c fdbrokerd -s h -l help -d 'show this help message and exit'
complete -c fdbrokerd -l policy -r -F -d 'the policy, or a compiled policy whose name ends in .json'
complete -c fdbrokerd -l foreground -d 'stay the caller\'s child (this is the default)'
complete -c fdbrokerd -l daemon -d 'go into the background'
complete -c fdbrokerd -l stop -d 'start nothing: end the broker that holds the lock of the pidfile, return when it is gone'
complete -c fdbrokerd -l precompile -d 'start nothing: compile the broker\'s sources for later starts, as root, which are faster then'
complete -c fdbrokerd -l pidfile -r -F -d 'keep this file locked, with the process id in it'
complete -c fdbrokerd -l socket -r -F -d 'make this SOCK_SEQPACKET socket, and none of the policy\'s listeners'
complete -c fdbrokerd -l stream -r -F -d 'make this SOCK_STREAM socket, and none of the policy\'s listeners'
complete -c fdbrokerd -l dgram -r -F -d 'make this SOCK_DGRAM socket, and none of the policy\'s listeners'
complete -c fdbrokerd -l socket-group -x -a '(__fish_complete_groups)' -d 'group of the sockets for requests'
complete -c fdbrokerd -l socket-mode -x -d 'mode of the sockets for requests, in octal'
complete -c fdbrokerd -l control -r -F -d 'make the control socket here, or none'
complete -c fdbrokerd -l inherited -x -d 'serve the connection on this descriptor, as inetd gives it on 0'
complete -c fdbrokerd -l audit -r -F -d 'file to append the audit to, - for standard output, or none'
complete -c fdbrokerd -l user -x -a '(__fish_complete_users)' -d 'whom the broker runs as: a name, or UID:GID'
complete -c fdbrokerd -l ready-fd -x -d 'write \'ready\' here when it serves, and close it'
complete -c fdbrokerd -l dev -d 'accept sources and policies that others than root can change'
complete -c fdbrokerd -l version -d 'show program\'s version number and exit'
