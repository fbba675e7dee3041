"""What ncnn's files hold, read without ncnn: it crashes the process on a file that it does not expect."""
