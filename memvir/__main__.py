from memvir.cli import main

main()
